"""The measurement of peak memory, and the goal it is for."""

import pytest

from benchmarks import memory

SHAPE = (1, 3, 4096, 64)


@pytest.mark.skipif(not memory.AVAILABLE, reason="peak memory is read from Linux's /proc")
def test_t5_bias_takes_less_than_an_eighth_of_pytorchs_memory():
    ours, eager = (memory.peak_bytes(provider, SHAPE) for provider in ("ours", "eager"))
    assert ours >= 3 * 3 * 4096 * 64 * 4  # at least the gradients of q, k and v
    assert eager >= 3 * 3 * 4096**2 * 4  # at least bias, probabilities and their gradient
    assert eager > memory.GOAL * ours
