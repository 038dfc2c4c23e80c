"""Whole layers of encoders and decoders: the addition to the residual stream is part of the next norm's kernel, or of
the feed-forward's last matmul.

As in _layers.py, the classes have no state, and ``super()`` is the original code. Submodules that do not take part in a
fusion (attention, the first norm) are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..nn.submodules import pending_dropout
from ._layers import add_dropped_output, add_norm, add_output
from ._parts import Fused, feed_forward


class LlamaDecoderLayer(Fused):
    """Attention and feed-forward, each behind a norm: the first residual is added by the second norm's kernel, the
    second one by the feed-forward's last matmul."""

    proof = {"forward": ("5ef668e13df11f18",)}  # Llama, Mistral, Qwen, Gemma and many others
    operations = "add_rms_norm, feed_forward with residual"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return self.add_to_residual(attended, hidden_states)

    def add_to_residual(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """The layer's output from the attention's and the layer's input."""
        normed, summed = add_norm(self.post_attention_layernorm, attended, hidden_states)
        return add_output(self.mlp, normed, summed)


class GPT2Block(Fused):
    """The same with layer norms; a layer with cross-attention runs the original code."""

    proof = {"forward": ("85a4b1ba667dd8d4",)}
    operations = "add_layer_norm, feed_forward with residual"

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        normed, summed = add_norm(self.ln_2, attended, hidden_states)
        return add_output(self.mlp, normed, summed)


class CLIPEncoderLayer(Fused):
    """The same in CLIP's names."""

    proof = {"forward": ("a5fa182ef73398e0",)}
    operations = "add_layer_norm, feed_forward with residual"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        normed = self.layer_norm1(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        normed, summed = add_norm(self.layer_norm2, attended, hidden_states)
        return add_output(self.mlp, normed, summed)


class ViTLayer(Fused):
    """The same in ViT's, with dropout behind both sublayers."""

    proof = {"forward": ("d688c30bce2c2f64",)}
    operations = "add_layer_norm, feed_forward with residual"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        attended, dropout_p = pending_dropout(self.dropout, attended)
        normed, summed = add_norm(self.layernorm_after, attended, hidden_states, dropout_p)
        return add_dropped_output(self.mlp, self.dropout, normed, summed)


class Phi3DecoderLayer(LlamaDecoderLayer):
    """Llama's with dropout behind both sublayers."""

    proof = {"forward": ("da3f367f1ed5a591",)}

    def add_to_residual(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        attended, dropout_p = pending_dropout(self.resid_attn_dropout, attended)
        normed, summed = add_norm(self.post_attention_layernorm, attended, hidden_states, dropout_p)
        return add_dropped_output(self.mlp, self.resid_mlp_dropout, normed, summed)


class WhisperEncoderLayer(Fused):
    """Norms first, as Whisper, MBart and Pegasus have them; the feed-forward is in the layer itself."""

    proof = {"forward": ("ebb69107f7ec832d",)}
    operations = "add_layer_norm, feed_forward with residual"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        normed = self.self_attn_layer_norm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        normed, summed = add_norm(self.final_layer_norm, attended, hidden_states, _dropout_p(self))
        out = _feed_forward_and_add(self, normed, summed)
        if out.dtype == torch.float16:
            limit = torch.finfo(out.dtype).max - 1000
            out = out.clamp(-limit, limit)
        return out


class WhisperDecoderLayer(Fused):
    proof = {"forward": ("88777d7c4a4434b0", "970c126e0fd8aa9e")}  # Whisper, MBart
    operations = "add_layer_norm, feed_forward with residual"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        cache = {"past_key_values": past_key_values, **kwargs}
        delta, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask=attention_mask, **cache)
        summed = hidden_states
        if encoder_hidden_states is not None:
            normed, summed = add_norm(self.encoder_attn_layer_norm, delta, summed, _dropout_p(self))
            delta, _ = self.encoder_attn(
                normed, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **cache
            )
        normed, summed = add_norm(self.final_layer_norm, delta, summed, _dropout_p(self))
        return _feed_forward_and_add(self, normed, summed)


class BartEncoderLayer(Fused):
    """Norms last, as Bart and Marian have them."""

    proof = {"forward": ("75087fbd1c258bb5",)}
    operations = "feed_forward, add_layer_norm"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        delta, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
        x, _ = add_norm(self.self_attn_layer_norm, delta, hidden_states, _dropout_p(self))
        out, _ = add_norm(self.final_layer_norm, _feed_forward(self, x), x, _dropout_p(self))
        if out.dtype == torch.float16 and not out.isfinite().all():
            limit = torch.finfo(out.dtype).max - 1000
            out = out.clamp(-limit, limit)
        return out


class BartDecoderLayer(Fused):
    proof = {"forward": ("42cf57ef7ac88b0b",)}
    operations = "feed_forward, add_layer_norm"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        cache = {"past_key_values": past_key_values, **kwargs}
        delta, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **cache)
        x, _ = add_norm(self.self_attn_layer_norm, delta, hidden_states, _dropout_p(self))
        if encoder_hidden_states is not None:
            delta, _ = self.encoder_attn(
                x, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **cache
            )
            x, _ = add_norm(self.encoder_attn_layer_norm, delta, x, _dropout_p(self))
        return add_norm(self.final_layer_norm, _feed_forward(self, x), x, _dropout_p(self))[0]


def _dropout_p(layer: Any) -> float:
    return layer.dropout if layer.training else 0.0


def _feed_forward(layer: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``residual + fc2(dropout(activation_fn(fc1(x))))`` of a layer that has these modules itself."""
    inner = layer.activation_dropout if layer.training else 0.0
    out = feed_forward(x, layer.fc1, layer.activation_fn, layer.fc2, residual, inner)
    if out is None:
        out = layer.fc2(dropout(layer.activation_fn(layer.fc1(x)), inner))
        out = out if residual is None else residual + out
    return out


def _feed_forward_and_add(layer: Any, normed: Tensor, summed: Tensor) -> Tensor:
    dropout_p = _dropout_p(layer)
    if dropout_p:
        return summed + dropout(_feed_forward(layer, normed), dropout_p)
    return _feed_forward(layer, normed, summed)


LAYERS: tuple[type[Fused], ...] = (
    LlamaDecoderLayer,
    Phi3DecoderLayer,
    GPT2Block,
    CLIPEncoderLayer,
    ViTLayer,
    WhisperEncoderLayer,
    WhisperDecoderLayer,
    BartEncoderLayer,
    BartDecoderLayer,
)
