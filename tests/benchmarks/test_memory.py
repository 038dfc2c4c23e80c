"""The measurement of peak memory, and the goals it is for."""

import pytest

from benchmarks import memory

pytestmark = pytest.mark.skipif(not memory.AVAILABLE, reason="peak memory is read from Linux's /proc")


def test_t5_bias_takes_less_than_an_eighth_of_pytorchs_memory():
    ours, eager = (memory.peak_bytes(provider, "attention", (1, 3, 4096, 64)) for provider in ("ours", "eager"))
    assert ours >= 3 * 3 * 4096 * 64 * 4  # at least the gradients of q, k and v
    assert eager >= 0.99 * 3 * 3 * 4096**2 * 4  # bias, probabilities and their gradient; pages are counted in batches
    assert eager > memory.JOBS["attention"].goal * ours


def test_linear_cross_entropy_takes_less_than_a_quarter_of_pytorchs_memory():
    rows, width, classes = 2048, 64, 12000
    ours, eager = (
        memory.peak_bytes(provider, "linear_cross_entropy", (rows, width, classes)) for provider in ("ours", "eager")
    )
    table = rows * classes * 4
    assert ours >= table / 4  # the logits of a quarter of the rows
    assert eager >= 2 * table
    assert eager > memory.JOBS["linear_cross_entropy"].goal * ours
