"""The layers of a transformer (Vaswani et al. 2017, section 3.1) with the interface of ``torch.nn``.

A layer is a list of blocks (self-attention, attention to the memory, feed-forward), each with its dropout and its norm:

    post-norm:  x = norm(x + dropout(block(x)))          pre-norm (norm_first):  x = x + dropout(block(norm(x)))

Dropout, addition and the norm that follows are one kernel. Pre-norm's addition belongs with the *next* block's norm, so
a block's output is handed on un-added, from layer to layer where a stack runs them (transformer.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from .. import functional
from ..functional import _checks
from .attention import MultiheadAttention, added_mask, check_mask
from .linear import Linear
from .norm import LayerNorm, add_norm, add_residual
from .submodules import activation_name, is_plain, pending_dropout


class Block(NamedTuple):
    """A sublayer, and what follows (post-norm) or precedes (pre-norm) it."""

    function: Callable[[Tensor], Tensor]
    dropout: torch.nn.Module
    norm: torch.nn.Module


def post_norm(x: Tensor, blocks: Iterable[Block]) -> Tensor:
    """``x = norm(x + dropout(function(x)))`` for each block."""
    for block in blocks:
        delta, p = pending_dropout(block.dropout, block.function(x))
        x = add_norm(block.norm, delta, x, p)[0]
    return x


def pre_norm(
    residual: Tensor, delta: Tensor | None, p: float, blocks: Iterable[Block]
) -> tuple[Tensor, Tensor | None, float]:
    """``x = x + dropout(function(norm(x)))`` for each block, of ``x = residual + dropout(delta, p)``, left as such."""
    for block in blocks:
        normed, residual = add_norm(block.norm, delta, residual, p)
        delta, p = pending_dropout(block.dropout, block.function(normed))
    return residual, delta, p


def run_layer(layer: _Layer, x: Tensor, blocks: Iterable[Block]) -> Tensor:
    if not layer.norm_first:
        return post_norm(x, blocks)
    residual, delta, p = pre_norm(x, None, 0.0, blocks)
    return add_residual(delta, residual, p)


class Packing(NamedTuple):
    """Sequences laid end to end in rows ``(total, E)``: see :func:`fastformer.functional.attention_varlen`."""

    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Packing:
        with torch.inference_mode(False):  # attention looks at the values once per tensor, of which it wants a version
            ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return Packing(ends, max(lengths, default=0))


class _Layer(torch.nn.Module):
    """What the encoder's layer and the decoder's share."""

    norm_first: bool
    activation: Any
    self_attn: torch.nn.MultiheadAttention
    linear1: torch.nn.Linear
    linear2: torch.nn.Linear
    dropout: torch.nn.Dropout

    def _feed_forward(self, x: Tensor) -> Tensor:
        """``linear2(dropout(activation(linear1(x))))``."""
        first, second, name = self.linear1, self.linear2, activation_name(self.activation)
        plain = is_plain(first, Linear, torch.nn.Linear) and is_plain(second, Linear, torch.nn.Linear)
        if name is None or not plain or not is_plain(self.dropout, torch.nn.Dropout):
            return second(self.dropout(self.activation(first(x))))
        return functional.feed_forward(
            x,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            name,
            dropout_p=self.dropout.p,
            training=self.dropout.training,
        )


# The methods of torch's layers by which subclasses change a block.
_METHODS = ("_sa_block", "_mha_block", "_ff_block")


def _has_own_blocks(layer: torch.nn.Module, base: type) -> bool:
    """Whether ``layer``, of a class derived from ``base``, replaces one of the methods that torch's forward calls."""
    return any(
        name in layer.__dict__ or getattr(type(layer), name) is not getattr(base, name)
        for name in _METHODS
        if hasattr(base, name)
    )


def may_be_read(layer: object) -> bool:
    """Whether ``layer`` is one of ours and calling it would do nothing beside running its blocks."""
    if is_plain(layer, TransformerEncoderLayer):
        return not _has_own_blocks(layer, torch.nn.TransformerEncoderLayer)
    return is_plain(layer, TransformerDecoderLayer) and not _has_own_blocks(layer, torch.nn.TransformerDecoderLayer)


def _attend(
    attention: torch.nn.Module, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool
) -> Tensor:
    if not isinstance(attention, MultiheadAttention):  # torch's layers hand masks on as numbers
        mask = None if mask is None else added_mask(mask, x.dtype)
        padding = None if padding is None else added_mask(padding, x.dtype)
    return attention(x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=causal)[
        0
    ]


_OURS = {torch.nn.MultiheadAttention: MultiheadAttention, torch.nn.Linear: Linear, torch.nn.LayerNorm: LayerNorm}


def _use_ours(layer: torch.nn.Module) -> None:
    """Makes the submodules, which torch has built and initialised, those of their subclasses here."""
    for child in layer.children():
        child.__class__ = _OURS.get(type(child), type(child))


class TransformerEncoderLayer(_Layer, torch.nn.TransformerEncoderLayer):
    """Self-attention and feed-forward.

    Constructor, forward, attributes, initialisation and state_dict keys are those of
    ``torch.nn.TransformerEncoderLayer``, of which this is a subclass. A nested tensor is taken with ``batch_first`` and
    without masks: ``torch.nn.TransformerEncoder`` makes one of a padded batch.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_constructor(d_model, nhead, dim_feedforward, dropout, activation)
        torch.nn.TransformerEncoderLayer.__init__(
            self,
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _use_ours(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Runs the layer.

        Args:
            src: ``(N, S, E)`` with ``batch_first``, else ``(S, N, E)``; ``(S, E)`` for a single sequence.
            src_mask: ``(S, S)`` or ``(N * nhead, S, S)``, True = not allowed, or floats to be added.
            src_key_padding_mask: ``(N, S)`` (``(S)`` for a single sequence), True = ignored, or floats to be added.
            is_causal: a promise that ``src_mask`` is the causal mask, which then need not be read.

        Returns:
            The shape of ``src``.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit, naming the argument.
        """
        if _has_own_blocks(self, torch.nn.TransformerEncoderLayer):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if isinstance(src, Tensor) and src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask)
        batch, length = check_sequence("src", src, self.self_attn)
        names = ("src_mask", "src_key_padding_mask", "is_causal")
        check_masks(names, self.self_attn, batch, length, length, src_mask, src_key_padding_mask, is_causal)
        return run_layer(self, src, self.blocks(src_mask, src_key_padding_mask, is_causal))

    def blocks(
        self, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, packing: Packing | None = None
    ) -> tuple[Block, ...]:
        """The layer's two blocks, on padded batches or, given a ``packing``, on rows ``(total, E)``."""

        def attend(x: Tensor) -> Tensor:
            if packing is not None:
                assert isinstance(self.self_attn, MultiheadAttention)
                return self.self_attn.attend_packed(x, *packing)
            return _attend(self.self_attn, x, x, mask, key_padding_mask, is_causal)

        return Block(attend, self.dropout1, self.norm1), Block(self._feed_forward, self.dropout2, self.norm2)

    @property
    def packs(self) -> bool:
        """Whether :meth:`blocks` take a packing."""
        attention = self.self_attn
        return is_plain(attention, MultiheadAttention) and attention.packs_qkv and attention.batch_first

    def _forward_nested(self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        if mask is not None or key_padding_mask is not None or not self.packs or src.layout != torch.strided:
            raise ValueError(
                "src: a nested tensor is taken with the strided layout, with batch_first, without masks, and with a"
                " self_attn of fastformer.nn without hooks; use a padded tensor and src_key_padding_mask"
            )
        sequences = src.unbind()
        packing = Packing.of([len(s) for s in sequences], src.device)
        out = run_layer(self, torch.cat(sequences), self.blocks(None, None, False, packing))
        return torch.nested.as_nested_tensor(list(out.split([len(s) for s in sequences])))


class TransformerDecoderLayer(_Layer, torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to the encoder's output, and feed-forward.

    Constructor, forward, attributes, initialisation and state_dict keys are those of
    ``torch.nn.TransformerDecoderLayer``, of which this is a subclass.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_constructor(d_model, nhead, dim_feedforward, dropout, activation)
        torch.nn.TransformerDecoderLayer.__init__(
            self,
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _use_ours(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Runs the layer.

        Args:
            tgt: ``(N, T, E)`` with ``batch_first``, else ``(T, N, E)``; ``(T, E)`` for a single sequence.
            memory: the encoder's output, ``(N, S, E)``, ``(S, N, E)`` or ``(S, E)`` likewise.
            tgt_mask: ``(T, T)`` or ``(N * nhead, T, T)``, True = not allowed, or floats to be added.
            memory_mask: ``(T, S)`` or ``(N * nhead, T, S)`` likewise.
            tgt_key_padding_mask, memory_key_padding_mask: ``(N, T)`` and ``(N, S)``, without N for a single sequence,
                True = ignored, or floats to be added.
            tgt_is_causal, memory_is_causal: promises that the mask is the causal one, which then need not be read.

        Returns:
            The shape of ``tgt``.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit, naming the argument.
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if _has_own_blocks(self, torch.nn.TransformerDecoderLayer):
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        check_decoder(tgt, memory, self.self_attn, masks, tgt_is_causal, memory_is_causal)
        return run_layer(self, tgt, self.blocks(memory, *masks, tgt_is_causal, memory_is_causal))

    def blocks(
        self,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_padding: Tensor | None,
        memory_padding: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> tuple[Block, ...]:
        """The layer's three blocks."""

        def attend(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, tgt_mask, tgt_padding, tgt_is_causal)

        def attend_memory(x: Tensor) -> Tensor:
            return _attend(self.multihead_attn, x, memory, memory_mask, memory_padding, memory_is_causal)

        return (
            Block(attend, self.dropout1, self.norm1),
            Block(attend_memory, self.dropout2, self.norm2),
            Block(self._feed_forward, self.dropout3, self.norm3),
        )


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_constructor(
    d_model: int, nhead: int, dim_feedforward: int, dropout: float, activation: str | Callable[[Tensor], Tensor]
) -> None:
    """The arguments that torch would accept and fail on later, or refuse without saying which it is."""
    for name, size in (("d_model", d_model), ("nhead", nhead), ("dim_feedforward", dim_feedforward)):
        if size < 1:
            raise ValueError(f"{name}: {size} is not positive")
    if d_model % nhead:
        raise ValueError(f"nhead: {nhead} does not divide d_model {d_model}")
    _checks.probability("dropout", dropout)
    if isinstance(activation, str):
        _checks.choice("activation", activation, ("relu", "gelu"))
    elif not callable(activation):
        raise TypeError(f"activation: {activation!r} is neither a string nor callable")


def check_sequence(name: str, x: Tensor, attention: object) -> tuple[int | None, int]:
    """(batch size, or None for a single sequence, length) of what ``attention`` is to read."""
    _checks.tensor(name, x)
    if x.is_nested:
        raise ValueError(f"{name}: is a nested tensor; use a padded one and a key_padding_mask")
    batch_first = getattr(attention, "batch_first", False)
    if x.dim() not in (2, 3):
        layout = "(N, S, E)" if batch_first else "(S, N, E)"
        raise ValueError(f"{name}: {x.dim()} dimensions; expected {layout} or (S, E)")
    embed_dim = getattr(attention, "embed_dim", x.shape[-1])
    if x.shape[-1] != embed_dim:
        raise ValueError(f"{name}: last dimension {x.shape[-1]} is not d_model, {embed_dim}")
    if x.dim() == 2:
        return None, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def check_masks(
    names: tuple[str, str, str],
    attention: object,
    batch: int | None,
    length: int,
    source: int,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool | None,
) -> None:
    """What restricts ``length`` queries and ``source`` keys: the masks and the promise that the first is causal."""
    heads = getattr(attention, "num_heads", 1)
    check_mask(names[0], mask, (length, source), ((batch or 1) * heads, length, source))
    check_mask(names[1], padding, (source,) if batch is None else (batch, source))
    if is_causal and mask is None:
        raise ValueError(f"{names[2]}: is a promise about {names[0]}, which is None; pass the causal mask as well")


def check_decoder(
    tgt: Tensor,
    memory: Tensor,
    attention: object,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    tgt_is_causal: bool | None,
    memory_is_causal: bool,
) -> int:
    """The arguments of a decoder and its layers; returns the length of ``tgt``."""
    batch, length = check_sequence("tgt", tgt, attention)
    memory_batch, source = check_sequence("memory", memory, attention)
    if memory_batch != batch:
        raise ValueError(f"memory: batch size {memory_batch} is not tgt's {batch}")
    tgt_mask, memory_mask, tgt_padding, memory_padding = masks
    names = ("tgt_mask", "tgt_key_padding_mask", "tgt_is_causal")
    check_masks(names, attention, batch, length, length, tgt_mask, tgt_padding, tgt_is_causal)
    names = ("memory_mask", "memory_key_padding_mask", "memory_is_causal")
    check_masks(names, attention, batch, length, source, memory_mask, memory_padding, memory_is_causal)
    return length
