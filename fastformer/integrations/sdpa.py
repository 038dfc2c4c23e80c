"""``torch.nn.functional.scaled_dot_product_attention`` on fastformer's kernels, wherever it is called.

After :func:`register` torch still decides how a call is computed; what it gives to its flash attention runs here,
forward and backward:

- CPU: all calls without dropout whose mask needs no gradient. torch has no interface for replacing these kernels, so
  the two operators behind them are overridden in its dispatcher.
- CUDA: through ``torch.nn.attention.register_flash_attention_impl``: float16 and bfloat16 without a mask. torch may
  prefer another backend, such as cuDNN's; ``torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)`` decides that.

The rest stays torch's (fastformer.functional.scaled_dot_product_attention covers it); :func:`unregister` restores its
kernels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from ..functional._attention import Options, backward, forward, select
from ..functional._doors import new_seed
from ..functional.attention import MAX_HEAD_DIM, default_scale

NAME = "fastformer"
_cpu: torch.library.Library | None = None
_torchs: dict[tuple[str, str], Any] = {}


def register() -> None:
    """Makes torch's flash attention run fastformer's kernels, in this process, until :func:`unregister`."""
    global _cpu
    if _cpu is None:
        _cpu = _override("CPU", _CPU_KERNELS)
    if torch_attention.current_flash_attention_impl() != NAME:
        torch_attention.register_flash_attention_impl(NAME, register_fn=_Registration)
        torch_attention.activate_flash_attention_impl(NAME)


def unregister() -> None:
    """Gives torch its kernels back. Do so between steps: with dropout, forward and backward have to be of one kind."""
    global _cpu
    if _cpu is not None:
        _cpu._destroy()
        _cpu = None
    if torch_attention.current_flash_attention_impl() == NAME:
        torch_attention.restore_flash_attention_impl()


class _Registration:
    """What torch keeps while this implementation is the active one, and removes when another takes its place."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = _override("CUDA", _CUDA_KERNELS)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def _override(key: str, kernels: dict) -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL", key)
    for name, kernel in kernels.items():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            _torchs[name, key] = torch.library.get_kernel(f"aten::{name}", key)
        with warnings.catch_warnings():  # that a kernel is overridden is what was asked for
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            library.impl(name, kernel, key, with_keyset=True)
    return library


def _options(q: Tensor, scale: float | None, causal: bool, bias: Tensor | None = None, **more: Any) -> Options:
    # torch aligns causal at the top left; where there are as many queries as keys that is all the same.
    return Options(default_scale(scale, q), causal, bias=bias, top_left=causal, **more)


def _mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """torch's mask, numbers of any dtype and two to four dimensions, as ``Options.bias``."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    elif mask.dtype not in (q.dtype, torch.float32):
        mask = mask.to(q.dtype)
    return mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(-1, -1, -1, k.shape[2])


def _in_layout_of(q: Tensor, out: Tensor) -> Tensor:
    """``out`` with q's order of dimensions in memory, which torch's compiler takes for granted."""
    like = torch.empty_like(q) if out.shape == q.shape else q.new_empty(out.shape)
    return out if out.stride() == like.stride() else like.copy_(out)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out, lse = forward(select(q, k, v, options), q, k, v, options)
    return _in_layout_of(q, out), lse


# ---- CPU -------------------------------------------------------------------------------------------------------------


def _covered(q: Tensor, v: Tensor, dropout_p: float) -> bool:
    return dropout_p == 0 and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM


def _cpu_forward(keys, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    name = "_scaled_dot_product_flash_attention_for_cpu"
    if not _covered(query, value, dropout_p):
        more = {"attn_mask": attn_mask, "scale": scale}
        return _torchs[name, "CPU"].call_boxed(keys, query, key, value, dropout_p, is_causal, **more)
    options = _options(query, scale, is_causal, _mask(attn_mask, query, key))
    out, lse = _forward(query, key, value, options)
    if attn_mask is not None:
        lse = lse.masked_fill(lse.isneginf(), 0.0)  # torch's value where nothing is seen, good for either backward
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # torch's layout


def _cpu_backward(
    keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    name = "_scaled_dot_product_flash_attention_for_cpu_backward"
    if not _covered(query, value, dropout_p):
        saved = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
        return _torchs[name, "CPU"].call_boxed(keys, *saved, attn_mask=attn_mask, scale=scale)
    options = _options(query, scale, is_causal, _mask(attn_mask, query, key))
    grads = [
        torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype, device=t.device) for t in (query, key, value)
    ]  # fmt: skip
    kernels = select(query, key, value, options)
    backward(kernels, grad_out, None, query, key, value, out, logsumexp.contiguous(), options, (False, False), *grads)
    return tuple(grads)


_CPU_KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def _cuda_forward(
    keys, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):  # fmt: skip
    if return_debug_mask:
        name = "_scaled_dot_product_flash_attention"
        return _torchs[name, "CUDA"].call_boxed(keys, query, key, value, dropout_p, is_causal, True, scale=scale)
    # The dropout mask is a function of a seed that the host knows; it travels to backward in place of torch's.
    seed = new_seed() if dropout_p > 0 else torch.zeros((), dtype=torch.int64)
    options = _options(query, scale, is_causal, dropout_p=dropout_p, seed=int(seed))
    out, lse = _forward(query, key, value, options)
    state = torch.stack((seed, torch.zeros_like(seed))).to(torch.uint64)
    offset, debug = torch.zeros((), dtype=torch.uint64), query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], state, offset, debug


def _cuda_backward(
    keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    seed = int(philox_seed[0]) if dropout_p > 0 else 0
    options = _options(query, scale, is_causal, dropout_p=dropout_p, seed=seed)
    grads = [torch.empty_like(t) for t in (query, key, value)]
    kernels = select(query, key, value, options)
    backward(kernels, grad_out, None, query, key, value, out, logsumexp.contiguous(), options, (False, False), *grads)
    return tuple(grads)


_CUDA_KERNELS = {
    "_scaled_dot_product_flash_attention": _cuda_forward,
    "_scaled_dot_product_flash_attention_backward": _cuda_backward,
}
