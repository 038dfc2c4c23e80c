"""Multi-head attention (Vaswani et al. 2017, section 3.2.2) with the interface of ``torch.nn.MultiheadAttention``.

Without weights to return one fused kernel computes softmax(q k^T / sqrt(D) + masks) v, and the (L, S) matrix never
exists; for self-attention with no other mask than a causal or a key padding one it reads the packed projection in
place, and its backward writes one packed gradient. With weights wanted they are computed explicitly below.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from .. import functional
from ..backends import matmul
from ..backends.registry import report_unfused
from ..functional.attention import MAX_HEAD_DIM
from ..functional.linear import linear


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
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        self_attention = query is key and key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        length, source = query.shape[1], key.shape[1]
        extended = self.bias_k is not None or self.add_zero_attn
        dropout_p = self.dropout if self.training else 0.0
        causal = is_causal and length == source and not extended
        fusible = not need_weights and self.head_dim <= MAX_HEAD_DIM
        plain = (attn_mask is None or causal) and (key_padding_mask is None or key_padding_mask.dtype == torch.bool)
        weights = None
        if fusible and plain and self_attention and self._qkv_same_embed_dim and not extended:
            qkv = linear(query, self.in_proj_weight, self.in_proj_bias)
            qkv = qkv.unflatten(2, (3, self.num_heads, self.head_dim))
            out = functional.attention_qkvpacked(
                qkv, causal=causal, key_padding_mask=key_padding_mask, dropout_p=dropout_p
            )
        else:
            q, k, v = self._project(query, key, value, self_attention)
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
                out, weights = _explicit_attention(q, k, v, mask, dropout_p)
            out = out.transpose(1, 2)
        out = linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)

        if need_weights and weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            weights = None
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, self_attention: bool) -> tuple[Tensor, ...]:
        """q ``(N, H, L, D)``, k and v ``(N, H, S, D)``."""
        embed, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and self_attention:
            projected = linear(query, self.in_proj_weight, bias).chunk(3, 2)
        elif self._qkv_same_embed_dim and key is value:
            weights = self.in_proj_weight.split((embed, 2 * embed))
            biases = (None, None) if bias is None else bias.split((embed, 2 * embed))
            projected = (linear(query, weights[0], biases[0]), *linear(key, weights[1], biases[1]).chunk(2, 2))
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = tuple(map(linear, (query, key, value), weights, biases))
        return tuple(x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)

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
        if key_padding_mask is not None:
            expected = (source,) if query.dim() == 2 else (batch, source)
            if key_padding_mask.shape != expected:
                raise ValueError(f"key_padding_mask: shape {tuple(key_padding_mask.shape)} is not {expected}")
        if attn_mask is not None:
            accepted = ((length, source), (batch * self.num_heads, length, source))
            if tuple(attn_mask.shape) not in accepted:
                raise ValueError(
                    f"attn_mask: shape {tuple(attn_mask.shape)} is neither {accepted[0]} nor {accepted[1]}"
                )
        elif is_causal:
            raise ValueError("is_causal: is a promise about attn_mask, which is None; pass the causal mask as well")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name}: dtype {mask.dtype} is neither bool nor floating point")


def _masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Both masks as arguments of :func:`fastformer.functional.attention`."""
    numbers = [m for m in (key_padding_mask, attn_mask) if m is not None and m.dtype != torch.bool]
    if not numbers:
        mask = None if attn_mask is None else ~_by_head(attn_mask, num_heads)
        return {"key_padding_mask": key_padding_mask, "attn_mask": mask}
    if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
        assert attn_mask is not None
        return {"key_padding_mask": key_padding_mask, "bias": _by_head(attn_mask, num_heads).to(dtype)}
    return {"bias": _merged_mask(key_padding_mask, attn_mask, num_heads, dtype)}


def _by_head(attn_mask: Tensor, num_heads: int) -> Tensor:
    """(L, S) or (N * num_heads, L, S) -> (1, 1, L, S) or (N, num_heads, L, S)."""
    return attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, num_heads))


def _merged_mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to add to the scores, broadcastable to (N, num_heads, L, S); None if there is none."""
    parts = []
    if attn_mask is not None:
        parts.append(_by_head(attn_mask, num_heads))
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None, :])
    added = [torch.zeros_like(m, dtype=dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m for m in parts]
    return sum(added[1:], added[0]).to(dtype) if added else None


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """q (N, H, L, D), k and v (N, H, S, D) -> out (N, H, L, D), weights (N, H, L, S), after dropout as in PyTorch."""
    dtype = q.dtype
    if matmul.converts(q):
        q, k, v = q.float(), k.float(), v.float()
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
    weights = functional.softmax(scores if mask is None else scores + mask, -1)
    if dropout_p > 0:
        weights = dropout(weights, dropout_p)
    return (weights @ v).to(dtype), weights.to(dtype)
