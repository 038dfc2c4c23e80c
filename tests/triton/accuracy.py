"""The numerics rule: our error against float64 is at most twice PyTorch's in the same dtype, plus one rounding."""

import torch
from torch import Tensor


def check(
    name: str,
    ours: Tensor | None,
    theirs: Tensor | None,
    exact: Tensor | None,
    summand: Tensor | None = None,
    roundings: int = 1,
) -> None:
    """Asserts the rule for one output.

    Args:
        name: for the message.
        ours, theirs: the output and PyTorch's, in the same dtype; ``theirs`` may be NaN where PyTorch gives up.
        exact: the same in float64. Where it is infinite or NaN, ``ours`` must be the same.
        summand: what the output is a sum or difference of, if that is larger than the output itself: one rounding is
            then of the largest of these.
        roundings: how many are allowed.
    """
    if exact is None:
        assert ours is None, f"{name}: expected None"
        return
    assert ours is not None and theirs is not None, f"{name}: missing"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, expected {theirs.dtype}"
    assert ours.shape == exact.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    rounding = torch.finfo(ours.dtype).eps
    ours, theirs, exact = ours.double().cpu(), theirs.double().cpu(), exact.cpu()
    finite = exact.isfinite()
    torch.testing.assert_close(ours[~finite], exact[~finite], equal_nan=True, msg=f"{name}: infinities or NaN differ")
    ours, theirs, exact = ours[finite], theirs[finite], exact[finite]
    if ours.numel() == 0:
        return
    error = (ours - exact).abs().max().item()
    comparable = theirs.isfinite()
    theirs_error = (theirs - exact)[comparable].abs().max().item() if comparable.any() else 0.0
    largest = max(x.abs().max().item() for x in (exact, summand) if x is not None and x.numel())
    allowed = 2 * theirs_error + roundings * rounding * largest
    assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {theirs_error:.3g}, allowed {allowed:.3g}"


def check_all(names: str, ours: tuple, theirs: tuple, exact: tuple, roundings: int = 1, **summands: Tensor) -> None:
    """:func:`check` of several outputs at once; ``names`` separated by spaces, each one's summand by its name."""
    for name, *outputs in zip(names.split(), ours, theirs, exact, strict=True):
        check(name, *outputs, summands.get(name), roundings)


def double(*values):
    """The arguments with every floating-point tensor in float64."""
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)
