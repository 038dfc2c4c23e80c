"""The rule every operation's numbers are held to, and its one table of constants.

    max |ours - exact|  <=  2 max |torch - exact| + TINY[dtype] max |exact|

``exact`` is the computation in float64 on the same (already rounded) inputs, ``torch`` PyTorch's own in the dtype of
ours; maxima are over all elements of one output or gradient. Twice, because two good implementations round differently;
TINY, because torch is sometimes lucky: exact on the one element a tensor has.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest exact value. A half-precision result is rounded once from float32 by both, so one rounding;
# float32 sums and products round at every step: two units in the last place. In float64 torch *is* the exact value and
# its error counts as 0: what remains is the order of additions.
TINY = {
    torch.float32: 2.0**-22,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
    torch.float64: 2.0**-40,
}


def assert_close_to_fp64(name: str, ours: Tensor, same_dtype: Tensor, exact: Tensor, *, scale: float = 0.0) -> None:
    """Asserts the rule for one tensor.

    Args:
        name: for the message.
        ours, same_dtype: our result and PyTorch's, same shape and dtype.
        exact: the result in float64. Where it is infinite or NaN, ours must be the same.
        scale: size of the terms whose difference the result is, where that may cancel to something much smaller (a
            gradient p - 1 with p = 1, say); replaces max |exact| where larger.
    """
    assert ours.shape == same_dtype.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert ours.dtype == same_dtype.dtype, f"{name}: dtype {ours.dtype}, torch {same_dtype.dtype}"
    tiny = TINY[ours.dtype]
    ours, same_dtype, exact = (t.detach().double().cpu() for t in (ours, same_dtype, exact))
    finite = exact.isfinite()
    odd = ~finite
    assert torch.equal(ours[odd].nan_to_num(nan=1.5), exact[odd].nan_to_num(nan=1.5)), f"{name}: infinities or NaN"
    if not finite.any():
        return
    error, allowed = ((t - exact)[finite].abs().max().item() for t in (ours, same_dtype))
    allowed = 2 * allowed + tiny * max(exact[finite].abs().max().item(), scale)
    assert error <= allowed, f"{name}: error {error:.3g} is over {allowed:.3g}"
