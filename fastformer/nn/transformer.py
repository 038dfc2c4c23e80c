"""Stacks of transformer layers (Vaswani et al. 2017, section 3.1) with the interface of ``torch.nn``.

A stack runs the blocks of its layers (transformer_layers.py) without stopping between them: pre-norm's residual
addition is one kernel with the next layer's norm, or the final one. Where ``torch.nn.TransformerEncoder`` gives zeros
at padding, as it does for inference, ours lays the sequences end to end once and computes no padding in any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from ..functional._doors import through_operator, transforming
from .attention import added_mask
from .norm import LayerNorm, add_norm, add_residual
from .transformer_layers import (
    Block,
    Packing,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    check_constructor,
    check_decoder,
    check_masks,
    check_sequence,
    may_be_read,
    post_norm,
    pre_norm,
)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """Copies of ``encoder_layer`` one after the other, and a final norm.

    Constructor, forward, attributes and state_dict keys are those of ``torch.nn.TransformerEncoder``, of which this is
    a subclass. Where that would run on nested tensors (inference on left-aligned padding, post-norm: see its
    ``enable_nested_tensor``) the results at padding are zeros here too, and nothing is computed for it.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # torch warns of what it cannot do on nested tensors. There are none here.
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        self.use_nested_tensor = enable_nested_tensor and _has_nested_path(encoder_layer)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Runs all layers.

        Args:
            src, mask, src_key_padding_mask: as in :meth:`TransformerEncoderLayer.forward`.
            is_causal: a promise that ``mask`` is the causal mask, which then need not be read, or that it is not. None:
                it is looked at, once (on a GPU that waits for the device; not while compiling).

        Returns:
            The shape of ``src``.
        """
        attention = getattr(self.layers[0], "self_attn", None)
        batch, length = check_sequence("src", src, attention)
        names = ("mask", "src_key_padding_mask", "is_causal")
        check_masks(names, attention, batch, length, length, mask, src_key_padding_mask, is_causal)
        if self._clears_padding(src, mask, src_key_padding_mask):
            assert src_key_padding_mask is not None
            return self._without_padding(src, src_key_padding_mask.logical_not())
        causal = _is_causal(mask, is_causal, length)
        return self._run(src, mask, src_key_padding_mask, causal, self.norm)

    def _run(
        self,
        src: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        causal: bool,
        norm: torch.nn.Module | None,
    ) -> Tensor:
        def call(layer: torch.nn.Module, x: Tensor) -> Tensor:
            masks = (mask, key_padding_mask)
            if not isinstance(layer, TransformerEncoderLayer):
                masks = (_numbers(mask, x.dtype), _numbers(key_padding_mask, x.dtype))
            return layer(x, src_mask=masks[0], src_key_padding_mask=masks[1], is_causal=causal)

        return _run_layers(self.layers, src, norm, lambda layer: layer.blocks(mask, key_padding_mask, causal), call)

    def _clears_padding(self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Whether torch's encoder would take its path for inference, which gives zeros at padding."""
        first = self.layers[0]
        if (
            key_padding_mask is None
            or mask is not None
            or src.dim() != 3
            or first.training
            or not getattr(self, "use_nested_tensor", False)
            or not torch.backends.mha.get_fastpath_enabled()
            or torch.is_autocast_enabled(src.device.type)
            or src.device.type not in ("cpu", "cuda")
        ):
            return False
        compiling = torch.compiler.is_compiling()
        tensors = (src, *first.parameters())
        if torch.overrides.has_torch_function(tensors) or (not compiling and transforming()):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        if not getattr(self, "mask_check", True):
            return True
        return not compiling and _left_aligned(key_padding_mask.logical_not())

    def _without_padding(self, src: Tensor, keep: Tensor) -> Tensor:
        """The encoder on the first ``keep.sum(1)`` positions of each sequence, with zeros elsewhere before the norm."""
        counts = keep.sum(1)
        keep = torch.arange(keep.shape[1], device=keep.device) < counts[:, None]
        if through_operator(src) or not all(may_be_read(layer) and layer.packs for layer in self.layers):
            out = self._run(src, None, ~keep, False, None)
            out = out.masked_fill(~keep[:, :, None], 0)
        else:
            lengths, rows = counts.tolist(), src.flatten(0, 1)
            packing = Packing.of(lengths, src.device)
            taken = None if sum(lengths) == len(rows) else keep.flatten().nonzero()[:, 0]

            def blocks_of(layer: TransformerEncoderLayer) -> Iterable[Block]:
                return layer.blocks(None, None, False, packing)

            done = _run_layers(self.layers, rows if taken is None else rows[taken], None, blocks_of, _not_called)
            out = done if taken is None else torch.zeros_like(rows).index_copy_(0, taken, done)
            out = out.view(src.shape)
        return out if self.norm is None else self.norm(out)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """Copies of ``decoder_layer`` one after the other, and a final norm.

    Constructor, forward, attributes and state_dict keys are those of ``torch.nn.TransformerDecoder``, of which this is
    a subclass.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Runs all layers.

        Args:
            tgt, memory, and the masks: as in :meth:`TransformerDecoderLayer.forward`.
            tgt_is_causal: a promise that ``tgt_mask`` is the causal mask, which then need not be read, or that it is
                not. None: it is looked at, once (on a GPU that waits for the device; not while compiling).
            memory_is_causal: such a promise about ``memory_mask``.

        Returns:
            The shape of ``tgt``.
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        attention = getattr(self.layers[0], "self_attn", None)
        length = check_decoder(tgt, memory, attention, masks, tgt_is_causal, memory_is_causal)
        causal = (_is_causal(tgt_mask, tgt_is_causal, length), memory_is_causal)

        def call(layer: torch.nn.Module, x: Tensor) -> Tensor:
            return layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal[0],
                memory_is_causal=causal[1],
            )

        return _run_layers(self.layers, tgt, self.norm, lambda layer: layer.blocks(memory, *masks, *causal), call)


class Transformer(torch.nn.Transformer):
    """An encoder and a decoder.

    Constructor, forward, attributes, initialisation and state_dict keys are those of ``torch.nn.Transformer``, of which
    this is a subclass.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_constructor(d_model, nhead, dim_feedforward, dropout, activation)
        layer_options: dict[str, Any] = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "batch_first": batch_first,
            "norm_first": norm_first,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }

        def final_norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(d_model, nhead, **layer_options)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, final_norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(d_model, nhead, **layer_options)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, final_norm())
        super().__init__(
            d_model,
            nhead,
            custom_encoder=custom_encoder,
            custom_decoder=custom_decoder,
            batch_first=batch_first,
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encodes ``src`` and decodes ``tgt`` beside it.

        Args:
            src, src_mask, src_key_padding_mask, src_is_causal: as in :meth:`TransformerEncoder.forward`.
            tgt and the rest: as in :meth:`TransformerDecoder.forward`.

        Returns:
            The shape of ``tgt``.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit, naming the argument.
        """
        layout = _Layout(self.d_model, self.batch_first)
        if check_sequence("src", src, layout)[0] != check_sequence("tgt", tgt, layout)[0]:
            raise ValueError(f"src: shape {tuple(src.shape)} has another batch than tgt's {tuple(tgt.shape)}")
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )


# ---- running a stack -------------------------------------------------------------------------------------------------


def _run_layers(
    layers: Iterable[Any],
    x: Tensor,
    norm: torch.nn.Module | None,
    blocks_of: Callable[[Any], Iterable[Block]],
    call: Callable[[torch.nn.Module, Tensor], Tensor],
) -> Tensor:
    """All layers and the final norm. Ours run block by block; others, and those with hooks, are called."""
    delta: Tensor | None = None
    p = 0.0
    for layer in layers:
        readable = may_be_read(layer)
        if readable and layer.norm_first:
            x, delta, p = pre_norm(x, delta, p, blocks_of(layer))
            continue
        x, delta, p = add_residual(delta, x, p), None, 0.0
        x = post_norm(x, blocks_of(layer)) if readable else call(layer, x)
    return add_residual(delta, x, p) if norm is None else add_norm(norm, delta, x, p)[0]


def _not_called(layer: torch.nn.Module, x: Tensor) -> Tensor:
    raise AssertionError("a packed batch goes through layers of ours only")


def _numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As torch's encoder hands masks on to layers of any making."""
    return None if mask is None else added_mask(mask, dtype)


# ---- what torch's own classes find out of their arguments ------------------------------------------------------------


class _Layout(NamedTuple):
    """Of the sequences of a Transformer whose encoder and decoder may be anything."""

    embed_dim: int
    batch_first: bool


def _is_causal(mask: Tensor | None, hint: bool | None, length: int) -> bool:
    """Whether ``mask`` hides exactly the positions after each query's own, if nothing is said about it."""
    if hint is not None or mask is None:
        return bool(hint)
    if mask.shape != (length, length) or torch.compiler.is_compiling() or transforming():
        return False
    hidden = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(mask, hidden if mask.dtype == torch.bool else added_mask(hidden, mask.dtype))


def _left_aligned(keep: Tensor) -> bool:
    """Whether all padding follows the tokens: keep ``(N, S)`` bool."""
    return torch.equal(keep, torch.arange(keep.shape[1], device=keep.device) < keep.sum(1, keepdim=True))


def _has_nested_path(layer: torch.nn.Module) -> bool:
    """Whether a ``torch.nn.TransformerEncoder`` of this layer runs on nested tensors."""
    return (
        isinstance(layer, torch.nn.TransformerEncoderLayer)
        and not layer.norm_first
        and layer.self_attn.batch_first
        and layer.self_attn._qkv_same_embed_dim
        and layer.self_attn.in_proj_bias is not None
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and layer.self_attn.num_heads % 2 == 0
    )
