"""Multi-head attention (Vaswani et al. 2017, section 3.2.2) with the interface of ``torch.nn.MultiheadAttention``.

Without weights to return one fused kernel computes softmax(q k^T / sqrt(D) + masks) v, and the (L, S) matrix never
exists; for self-attention with no other mask than a causal or a key padding one it reads the packed projection in
place, and its backward writes one packed gradient. With weights wanted they are computed explicitly below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from .. import functional
from ..backends import matmul
from ..backends.registry import report_unfused
from ..functional import _checks
from ..functional.attention import MAX_HEAD_DIM


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Constructor, forward, initialisation and state_dict keys of ``torch.nn.MultiheadAttention``, its base class.

    A query for which every key is masked gives zeros (the output projection's bias remains), with or without
    ``need_weights``, where PyTorch gives NaN on some of its paths. ``need_weights=False`` is the fast way.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(f"embed_dim and num_heads: {embed_dim} and {num_heads} are not both positive")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide embed_dim {embed_dim}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: {dropout} is not in [0, 1]")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from each query position to all key positions the masks leave.

        Args:
            query: ``(N, L, E)`` with ``batch_first``, else ``(L, N, E)``; ``(L, E)`` for a single sequence.
            key, value: ``(N, S, kdim)`` and ``(N, S, vdim)``, ``(S, N, ...)`` or ``(S, ...)`` likewise.
            key_padding_mask: ``(N, S)`` (``(S)`` for a single sequence), True = ignored, or floats to be added.
            need_weights: return the attention weights as well; this computes the whole (L, S) matrix.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``, True = not allowed, or floats to be added.
            average_attn_weights: average the returned weights over the heads.
            is_causal: a promise that ``attn_mask`` is the causal mask, which then need not be read.

        Returns:
            The output in the layout of ``query``, and the weights ``(N, L, S)``, ``(N, num_heads, L, S)`` if not
            averaged, without N for a single sequence, or None without ``need_weights``. S grows by one for each of
            ``add_bias_kv`` and ``add_zero_attn``.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit, naming the argument.
        """
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            try:  # torch's function for such tensors, where it has one
                return super().forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
            except AssertionError as error:
                raise ValueError(f"query, key, value: nested tensors are not taken here. {error}") from None
        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        self_attention = query is key and key is value
        batched = query.dim() == 3
        sequence_first = batched and not self.batch_first
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        length, source = (x.shape[0 if sequence_first else -2] for x in (query, key))
        extended = self.bias_k is not None or self.add_zero_attn
        dropout_p = self.dropout if self.training else 0.0
        causal = is_causal and length == source and not extended
        fusible = not need_weights and self.head_dim <= MAX_HEAD_DIM
        plain = (attn_mask is None or causal) and (key_padding_mask is None or key_padding_mask.dtype == torch.bool)
        weights = None
        if fusible and plain and self_attention and self.packs_qkv:
            qkv = self._packed_qkv(query)
            qkv = qkv.transpose(0, 1) if sequence_first else qkv if batched else qkv[None]
            out = functional.attention_qkvpacked(
                qkv, causal=causal, key_padding_mask=key_padding_mask, dropout_p=dropout_p
            )
        else:
            q, k, v = (self._by_head(x, sequence_first) for x in self._project(query, key, value))
            if extended:
                k, v = self._extend(k, v)
                extra = k.shape[2] - source
                key_padding_mask = None if key_padding_mask is None else pad(key_padding_mask, (0, extra))
                attn_mask = None if attn_mask is None else pad(attn_mask, (0, extra))
            if not (fusible or need_weights):
                report_unfused("attention", f"head_dim over {MAX_HEAD_DIM}")
            if fusible:
                masks = _masks(key_padding_mask, None if causal else attn_mask, self.num_heads, q.dtype)
                attended = functional.attention(q, k, v, causal=causal, dropout_p=dropout_p, **masks)
                assert isinstance(attended, Tensor)  # not a pair: return_lse is off
                out = attended
            else:
                mask = _merged_mask(key_padding_mask, attn_mask, self.num_heads, q.dtype)
                out, weights = explicit_attention(q, k, v, mask, 1 / math.sqrt(self.head_dim), dropout_p)
            out = out.transpose(1, 2)
        # Back in the query's layout before the projection, so that its result is contiguous.
        out = out.transpose(0, 1) if sequence_first else out if batched else out[0]
        out = self._merge_heads(out)
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    @property
    def packs_qkv(self) -> bool:
        """Whether one matmul gives q, k and v of equal lengths for the kernels to read in place."""
        extended = self.bias_k is not None or self.add_zero_attn
        return self._qkv_same_embed_dim and not extended and self.head_dim <= MAX_HEAD_DIM

    def attend_packed(self, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Self-attention within each of the sequences laid end to end in rows ``(total, E)``, without padding.

        Args:
            cu_seqlens, max_seqlen: as in :func:`fastformer.functional.attention_varlen`. The module must ``packs_qkv``.
        """
        q, k, v = self._packed_qkv(rows).unbind(1)
        out = functional.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=self.dropout if self.training else 0.0
        )
        assert isinstance(out, Tensor)  # not a pair: return_lse is off
        return self._merge_heads(out)

    def _packed_qkv(self, x: Tensor) -> Tensor:
        """x ``(*, E)`` -> ``(*, 3, H, D)``."""
        projected = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        return projected.unflatten(-1, (3, self.num_heads, self.head_dim))

    def _merge_heads(self, out: Tensor) -> Tensor:
        """The output projection: ``(*, H, D)`` -> ``(*, E)``."""
        return functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)

    def _by_head(self, x: Tensor, sequence_first: bool) -> Tensor:
        """``(N, L, E)``, ``(L, N, E)`` or ``(L, E)`` -> ``(N, H, L, D)``, a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.permute(1, 2, 0, 3) if sequence_first else x.transpose(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """q, k and v, each in the layout it came in."""
        embed, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return functional.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        if self._qkv_same_embed_dim and key is value:
            weights = self.in_proj_weight.split((embed, 2 * embed))
            biases = (None, None) if bias is None else bias.split((embed, 2 * embed))
            q, kv = map(functional.linear, (query, key), weights, biases)
            return q, *kv.chunk(2, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(functional.linear, (query, key, value), weights, biases))

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the learned key and value of ``add_bias_kv``, then the zeros of ``add_zero_attn``."""
        batch, heads, _, head_dim = k.shape
        if self.bias_k is not None:
            split = lambda b: b.view(1, heads, 1, head_dim).expand(batch, -1, -1, -1)  # noqa: E731
            k, v = torch.cat((k, split(self.bias_k)), 2), torch.cat((v, split(self.bias_v)), 2)
        if self.add_zero_attn:
            k, v = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1))
        return k, v

    def _check_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            _checks.tensor(name, x)
        layout = "(N, L, E)" if self.batch_first else "(L, N, E)"
        if query.dim() not in (2, 3):
            raise ValueError(f"query: {query.dim()} dimensions; expected {layout} or (L, E)")
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != query.dim():
                raise ValueError(f"{name}: {x.dim()} dimensions, but query has {query.dim()}")
            if x.shape[-1] != size:
                raise ValueError(f"{name}: last dimension {x.shape[-1]} is not {size}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: shape {tuple(value.shape)} does not go with key's {tuple(key.shape)}")
        batch_dim, sequence_dim = (0, 1) if self.batch_first else (1, 0)
        if query.dim() == 2:
            batch, length, source = 1, query.shape[0], key.shape[0]
        else:
            batch, length, source = query.shape[batch_dim], query.shape[sequence_dim], key.shape[sequence_dim]
            if key.shape[batch_dim] != batch:
                raise ValueError(f"key: batch size {key.shape[batch_dim]} is not query's {batch}")
        check_mask("key_padding_mask", key_padding_mask, (source,) if query.dim() == 2 else (batch, source))
        check_mask("attn_mask", attn_mask, (length, source), (batch * self.num_heads, length, source))
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: is a promise about attn_mask, which is None; pass the causal mask as well")


def check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """``mask`` is None, or bool or floating point and of one of ``shapes``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"{name}: {getattr(mask, 'dtype', type(mask).__name__)} is neither bool nor floating point")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: shape {tuple(mask.shape)} is not {' or '.join(map(str, shapes))}")


def _masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Both masks as arguments of :func:`fastformer.functional.attention`."""
    numbers = [m for m in (key_padding_mask, attn_mask) if m is not None and m.dtype != torch.bool]
    if not numbers:
        mask = None if attn_mask is None else ~_mask_by_head(attn_mask, num_heads)
        return {"key_padding_mask": key_padding_mask, "attn_mask": mask}
    if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
        assert attn_mask is not None
        return {"key_padding_mask": key_padding_mask, "bias": _mask_by_head(attn_mask, num_heads).to(dtype)}
    return {"bias": _merged_mask(key_padding_mask, attn_mask, num_heads, dtype)}


def _mask_by_head(attn_mask: Tensor, num_heads: int) -> Tensor:
    """(L, S) or (N * num_heads, L, S) -> (1, 1, L, S) or (N, num_heads, L, S)."""
    return attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, num_heads))


def _merged_mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to add to the scores, broadcastable to (N, num_heads, L, S); None if there is none."""
    parts = []
    if attn_mask is not None:
        parts.append(_mask_by_head(attn_mask, num_heads))
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None, :])
    added = [added_mask(m, dtype) for m in parts]
    return sum(added[1:], added[0]).to(dtype) if added else None


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, True = ignored, as numbers to be added to the scores; one of numbers as it is."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention step by step, for its weights or for what no kernel covers.

    Args:
        q: ``(N, H, L, D)``.
        k, v: ``(N, H, S, D)`` and Dv.
        mask: added to the scores, broadcastable to ``(N, H, L, S)``.

    Returns:
        ``(N, H, L, Dv)`` and the weights ``(N, H, L, S)``, after dropout as in PyTorch.
    """
    dtype = q.dtype
    if matmul.converts(q):
        q, k, v = q.float(), k.float(), v.float()
    scores = (q * scale) @ k.transpose(2, 3)
    weights = functional.softmax(scores if mask is None else scores + mask, -1)
    if dropout_p > 0:
        weights = dropout(weights, dropout_p)
    return (weights @ v).to(dtype), weights.to(dtype)
