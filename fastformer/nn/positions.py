"""Position encodings as modules: rotary, sinusoidal, learned, and T5's relative bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional.attention import check_buckets, relative_position_bucket
from .rotary_scaling import inverse_frequencies, scaling_type

FIRST_ROWS = 4096
"""Of a table, at most, before a text asks for more: Llama 3.1's 131,072 positions would be 64 MiB."""


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by their positions (:func:`fastformer.functional.rotary_embedding`).

    Holds the table of cosines and sines, one per device and precision, and makes it longer when a call needs that. It
    has no parameters and no state.

    Args:
        dim: rotated dimensions, the head size or less.
        base: theta; pair i turns by ``base^(-2 i / dim)`` per position.
        max_position_embeddings: for ``scaling``, the length the model was trained on; at most so many rows of a table
            are made before they are needed.
        interleaved: pairs are neighbours (GPT-J) instead of halves (Llama, GPT-NeoX).
        scaling: ``rope_scaling`` of a transformers configuration: "linear", "dynamic", "yarn", "llama3", "longrope" or
            "proportional" (rotary_scaling.py).

    Angles are computed in float32 as in transformers, in float64 for float64 queries.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        *,
        max_position_embeddings: int = 2048,
        interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: {dim} is not a positive even number")
        if max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings: {max_position_embeddings} is not positive")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.max_position_embeddings = max_position_embeddings
        self.scaling = None if scaling is None else dict(scaling)
        self.scaling_type = scaling_type(scaling)
        for name in ("short_factor", "long_factor"):
            given = () if self.scaling is None else self.scaling.get(name, ())
            if given and len(given) != dim // 2:
                raise ValueError(f"scaling: {name} has {len(given)} numbers for {dim // 2} pairs")
        self._scaled_for = max_position_embeddings  # the length whose frequencies "dynamic" and "longrope" use
        self._tables: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        self._frequencies: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tables are made again where they are needed: a file or a copy on another device has no use for them.
        return {**self.__dict__, "_tables": {}, "_frequencies": {}}

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}, scaling={self.scaling}"

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin ``(at least length, dim / 2)``, float32, or float64 for a ``dtype`` of float64."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._follow(length)
        key = (device, dtype, self._scaled_for)
        found = self._tables.get(key)
        if found is not None and len(found[0]) >= length:
            return found
        # Twice as long as before: texts that grow token by token would otherwise make it anew for each.
        rows = max(length, min(self.max_position_embeddings, FIRST_ROWS), 0 if found is None else 2 * len(found[0]))
        with torch.inference_mode(False):  # training may need it after generation
            made = self._rows(torch.arange(rows, device=device), dtype)
        if _is_real(made[0]):
            self._tables[key] = made
        return made

    def rows(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin ``(*position_ids.shape, dim / 2)`` of any positions, computed for them; dtypes as in
        :meth:`tables`.

        "dynamic" and "longrope" follow the largest position, which waits for a GPU; while torch.compile traces, they
        take the number of positions for it.
        """
        if self.scaling_type in ("dynamic", "longrope") and position_ids.numel():
            compiling = torch.compiler.is_compiling()
            self._follow(position_ids.shape[-1] if compiling else int(position_ids.max()) + 1)
        return self._rows(position_ids, torch.float64 if dtype == torch.float64 else torch.float32)

    def _rows(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (positions.device, dtype, self._scaled_for)
        found = self._frequencies.get(key)
        if found is None:
            with torch.inference_mode(False):
                frequencies, factor = inverse_frequencies(
                    self.dim, self.base, self.scaling, self.max_position_embeddings, self._scaled_for, dtype
                )
                found = frequencies.to(positions.device), factor
            if _is_real(found[0]):
                self._frequencies[key] = found
        frequencies, factor = found
        angle = positions[..., None].to(dtype) * frequencies
        return angle.cos() * factor, angle.sin() * factor

    def _follow(self, length: int) -> None:
        """Chooses the frequencies for a text of ``length`` where the scaling depends on it.

        "dynamic": new ones for a text longer than any, the original ones again for one within them.
        """
        trained = self.max_position_embeddings
        if self.scaling_type == "longrope":
            assert self.scaling is not None
            trained = self.scaling.get("original_max_position_embeddings") or trained
            self._scaled_for = trained + 1 if length > trained else trained
        elif self.scaling_type == "dynamic" and (length > self._scaled_for or length < trained < self._scaled_for):
            self._scaled_for = max(length, trained)
            self._tables.clear()
            self._frequencies.clear()

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        position_offset: int | Tensor = 0,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """q ``(B, Hq, S, D)``, k ``(B, Hkv, S, D)`` or None -> both rotated; arguments as in the function.

        The largest of ``position_ids`` is looked up on a CPU, and elsewhere for "dynamic" and "longrope" only, because
        that waits for the device: there call :meth:`tables` once if positions reach beyond ``max_position_embeddings``.
        """
        seqlen = q.shape[-2]
        given = position_ids if position_ids is not None else position_offset
        follows = self.scaling_type in ("dynamic", "longrope")
        if not isinstance(given, Tensor):
            length = given + seqlen
        elif given.numel() == 0 or torch.compiler.is_compiling() or (given.is_cuda and not follows):
            length = self.max_position_embeddings
        else:
            length = int(given.max()) + (1 if position_ids is not None else seqlen)
        cos, sin = self.tables(length, q.device, q.dtype)
        return functional.rotary_embedding(
            q,
            k,
            cos,
            sin,
            position_ids=position_ids,
            position_offset=position_offset,
            interleaved=self.interleaved,
            inplace=inplace,
        )


class SinusoidalPositionalEncoding(torch.nn.Module):
    """``dropout(x + sinusoids)`` (Vaswani et al. 2017, section 3.5); no parameters and no state.

    Args:
        d_model: the length of a row.
        dropout: probability of zeroing an element of the result while training.
        base: of the wavelengths.
        max_len: rows of the first table; longer texts extend it.
    """

    def __init__(self, d_model: int, dropout: float = 0.0, *, base: float = 10000.0, max_len: int = 512) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model: {d_model} is not positive")
        self.d_model, self.base, self.max_len = d_model, float(base), max_len
        self.dropout = torch.nn.Dropout(dropout)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def extra_repr(self) -> str:
        return f"{self.d_model}, base={self.base:g}"

    def forward(self, x: Tensor, position_offset: int = 0) -> Tensor:
        """x ``(*, S, d_model)``, whose first row is at ``position_offset`` -> the same shape and dtype."""
        _check_rows(x, self.d_model)
        length, key = position_offset + x.shape[-2], (x.device, x.dtype)
        table = self._tables.get(key)
        if table is None or len(table) < length:
            rows = max(length, self.max_len, 0 if table is None else 2 * len(table))
            table = functional.sinusoidal_positions(rows, self.d_model, base=self.base, dtype=x.dtype, device=x.device)
            self._tables[key] = table
        return self.dropout(x + table[position_offset:length])


class LearnedPositionalEncoding(torch.nn.Module):
    """``dropout(x + weight[position])``, a learned row per position (GPT, BERT; Gehring et al. 2017, arXiv:1705.03122).

    Args:
        max_len: rows of the table.
        d_model: the length of a row.
        dropout: probability of zeroing an element of the result while training.
        device, dtype: of ``weight``, which starts normally distributed with a deviation of 0.02, as in GPT-2 and BERT.
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.dropout = torch.nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``weight`` anew."""
        torch.nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))

    def forward(self, x: Tensor, position_offset: int = 0, *, position_ids: Tensor | None = None) -> Tensor:
        """x ``(*, S, d_model)`` -> the same shape.

        Args:
            position_offset: position of the first row, where there are no ``position_ids``.
            position_ids: ``(*, S)`` or broadcastable to it.
        """
        max_len, d_model = self.weight.shape
        _check_rows(x, d_model)
        if position_ids is not None:
            if position_offset:
                raise ValueError(f"position_offset: {position_offset} is given beside position_ids")
            return self.dropout(x + functional.embedding(position_ids, self.weight))
        end = position_offset + x.shape[-2]
        if not 0 <= position_offset <= end <= max_len:
            raise IndexError(f"position_offset: positions {position_offset} .. {end - 1} of {max_len}")
        return self.dropout(x + self.weight[position_offset:end])


class RelativePositionBias(torch.nn.Module):
    """T5's learned bias: a number per head and range of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    ``attention(q, k, v, relative_bias=module.relative_bias)`` adds it inside the kernel, which needs no memory for it;
    calling the module gives the tensor that is added, for attention of another making.

    Args:
        num_buckets: ranges of distances; half of them hold one distance each, the others grow logarithmically.
        max_distance: from this distance on all keys share the last bucket.
        num_heads: query heads.
        bidirectional: keys after the query have buckets of their own (an encoder's); otherwise they share the first.
        device, dtype: of ``weight``, which starts normally distributed with a deviation of 0.02.

    State: ``weight (num_buckets, num_heads)``, a T5 checkpoint's ``relative_attention_bias.weight``.
    """

    def __init__(
        self,
        num_buckets: int,
        max_distance: int,
        num_heads: int,
        bidirectional: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_buckets("num_buckets:", bidirectional, num_buckets, max_distance)
        if num_heads < 1:
            raise ValueError(f"num_heads: {num_heads} is not positive")
        self.num_buckets, self.max_distance, self.num_heads = num_buckets, max_distance, num_heads
        self.bidirectional = bool(bidirectional)
        self.weight = torch.nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``weight`` anew."""
        torch.nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        return f"{self.num_buckets}, {self.max_distance}, {self.num_heads}, bidirectional={self.bidirectional}"

    @property
    def relative_bias(self) -> functional.RelativeBias:
        """What :func:`fastformer.functional.attention` takes; there query i is at position i + Sk - Sq."""
        return functional.RelativeBias(self.weight, self.bidirectional, self.num_buckets, self.max_distance)

    def forward(self, query_length: int, key_length: int, query_offset: int = 0) -> Tensor:
        """The bias ``(1, num_heads, query_length, key_length)`` in the dtype of ``weight``.

        Args:
            query_length, key_length: at least 1.
            query_offset: position of the first query, that of the first key being 0: the tokens in a cache.
        """
        if query_length < 1 or key_length < 1:
            raise ValueError(f"query_length, key_length: {query_length} and {key_length} are not both positive")
        return bias_by_position(self.relative_bias, query_length, key_length, query_offset)


def bias_by_position(
    relative: functional.RelativeBias, query_length: int, key_length: int, query_offset: int
) -> Tensor:
    """``(1, H, query_length, key_length)``, what kernels add for ``relative``; see :class:`RelativePositionBias`."""
    # One row per distance, not per pair of positions; each query then reads a window of those rows.
    first = 1 - query_length - query_offset
    distance = torch.arange(first, key_length - query_offset, device=relative.table.device)
    by_distance = functional.embedding(relative_position_bucket(distance, *relative[1:]), relative.table).t()
    return by_distance.unfold(1, key_length, 1).flip(1)[None]


def _is_real(table: Tensor) -> bool:
    """Not one of a tracer's, which must not be kept."""
    return type(table) is Tensor


def _check_rows(x: Tensor, d_model: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.shape[-1] != d_model:
        raise ValueError(f"x: shape {tuple(x.shape)} is not (*, S, {d_model})")
