"""Schedules against their closed forms."""

import math

import pytest

from fastformer.training import learning_rate_factor


def test_warm_up_rises_linearly_from_the_first_step():
    values = [learning_rate_factor("cosine", s, 100, warmup=9) for s in range(10)]
    assert values[:9] == pytest.approx([(s + 1) / 10 for s in range(9)])
    assert values[9] == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine(final):
    for step in (10, 25, 55, 99, 100):
        expected = final + (1 - final) * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert learning_rate_factor("cosine", step, 100, warmup=10, final_ratio=final) == pytest.approx(expected)
    middle = learning_rate_factor("cosine", 55, 100, warmup=10, final_ratio=final)
    assert middle == pytest.approx((1 + final) / 2)


def test_linear_and_constant():
    assert [learning_rate_factor("linear", s, 10, final_ratio=0.0) for s in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert learning_rate_factor("linear", 5.5, 10, final_ratio=0.2) == pytest.approx(0.2 + 0.8 * 0.45)
    assert {learning_rate_factor("constant", s, 10) for s in (0, 5, 10, 20)} == {1.0}


def test_held_at_the_end():
    for kind in ("cosine", "linear"):
        assert learning_rate_factor(kind, 1000, 10, final_ratio=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "kind, position, total, options",
    [
        ("step", 0, 10, {}),
        ("cosine", -1, 10, {}),
        ("cosine", 0, 0, {}),
        ("cosine", 0, 10, {"warmup": -1}),
        ("cosine", 0, 10, {"final_ratio": 1.5}),
        ("wsd", 0, 10, {"decay_fraction": 0.0}),
    ],
)
def test_bad_input(kind, position, total, options):
    with pytest.raises(ValueError):
        learning_rate_factor(kind, position, total, **options)


def test_inverse_square_root():
    """Attention Is All You Need, equation 3: min(step^-0.5, step warmup^-1.5), here as a share of its peak."""
    warmup = 40  # steps that rise; the peak is the one after them
    for position in (0, 5, 39, 40, 41, 100, 1000):
        step, peak = position + 1, warmup + 1
        expected = min(step**-0.5, step * peak**-1.5) / peak**-0.5
        assert learning_rate_factor("inverse_sqrt", position, 2000, warmup=warmup) == pytest.approx(expected)


def test_warm_up_stable_decay():
    options = {"warmup": 10, "final_ratio": 0.01, "decay_fraction": 0.2}
    values = [learning_rate_factor("wsd", s, 100, **options) for s in range(101)]
    assert set(values[10:81]) == {1.0}
    # Exponential from the peak to a hundredth of it over the last 20 steps.
    assert values[81:] == pytest.approx([0.01 ** ((s - 80) / 20) for s in range(81, 101)])
    linear = [learning_rate_factor("wsd", s, 100, final_ratio=0.0, decay_fraction=0.5) for s in (50, 75, 100, 200)]
    assert linear == pytest.approx([1.0, 0.5, 0.0, 0.0])
    # A warm-up that reaches into the decay's part leaves it the rest.
    assert learning_rate_factor("wsd", 90, 100, warmup=90, decay_fraction=0.5) == 1.0
