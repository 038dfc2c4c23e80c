"""The layers of transformers as fused forwards, each for every class whose ``forward`` has the fingerprint it names.

A class here stands before the original one in the bases of the class that :func:`fastformer.optimize` makes of the two.
It has no state: parameters, submodules and their names are the original's. Where a submodule may not be read
(_parts.py), ``super().forward`` is the original code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .. import functional, nn
from ..nn.norm import add_norm as nn_add_norm
from ..nn.norm import add_residual
from ..nn.submodules import is_plain, pending_dropout
from ._parts import (
    Activation,
    Conv1D,
    Fused,
    activation_name,
    feed_forward,
    fits,
    gated_feed_forward,
    linear_weights,
    provable_activation,
    untouched,
)


def add_norm(norm: torch.nn.Module, x: Tensor, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """``(norm(summed), summed)`` with ``summed = residual + dropout(x)``, in one pass if the norm may be read."""
    if not isinstance(norm, RMSNorm):
        return nn_add_norm(norm, x, residual, dropout_p)
    weight = norm.weight_for(residual) if x.dtype == residual.dtype and untouched(norm) else None
    if weight is not None:
        return functional.add_rms_norm(x, residual, weight.shape, weight, norm.epsilon, dropout_p=dropout_p)
    summed = add_residual(x, residual, dropout_p)
    return norm(summed), summed


def add_output(module: torch.nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + module(x)``; a fused feed-forward adds the residual itself."""
    if isinstance(module, FeedForward) and untouched(module):
        found = module.block(x, residual)
        if found is not None:
            return found
    return residual + module(x)


def _unless_activation(module: torch.nn.Module, attribute: str) -> str | None:
    activation = getattr(module, attribute)
    if provable_activation(activation) is None:
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"there is no fused kernel for its activation, {name}"
    return None


# ---- norms -----------------------------------------------------------------------------------------------------------


class RMSNorm(Fused):
    """``weight * x / sqrt(mean(x^2) + eps)``, rounded to x's dtype once; transformers rounds before the weight too."""

    proof = {"forward": ("59b1089397db8f07", "73b76f0399eff912")}  # LlamaRMSNorm, T5LayerNorm
    operations = "rms_norm"

    @property
    def epsilon(self) -> float:
        return self.variance_epsilon

    def weight_for(self, x: Tensor) -> Tensor | None:
        """The kernel's weight, None where the result's dtype would not be x's."""
        weight = self.weight
        return weight if weight.dtype == x.dtype and x.shape[-1:] == weight.shape and fits(x) else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight_for(hidden_states)
        if weight is None:
            return super().forward(hidden_states)
        return functional.rms_norm(hidden_states, weight.shape, weight, self.epsilon)


class RMSNormInFloat(RMSNorm):
    """The weight is multiplied before the result is rounded, as the kernel does, so it may be float32 beside less."""

    proof = {"forward": ("fa5a4337d2533812",)}  # OlmoHybridRMSNorm

    def weight_for(self, x: Tensor) -> Tensor | None:
        weight = self.weight
        takes = weight.dtype == x.dtype or (weight.dtype == torch.float32 and x.dtype != torch.float64)
        return weight if takes and x.shape[-1:] == weight.shape and fits(x) else None


class GemmaRMSNorm(RMSNorm):
    """``(1 + weight) * x / sqrt(mean(x^2) + eps)``."""

    proof = {"forward": ("820e116c85900353",), "_norm": ("9bc6ec0af1d250fb",)}

    @property
    def epsilon(self) -> float:
        return self.eps

    def weight_for(self, x: Tensor) -> Tensor | None:
        if x.shape[-1:] != self.weight.shape or not fits(x):
            return None
        return 1.0 + self.weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


# ---- feed-forward blocks ---------------------------------------------------------------------------------------------


class FeedForward(Fused):
    """A block that may add a residual: :meth:`block`, which is None where the original code has to run."""

    operations = "feed_forward"

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.block(hidden_states, None)
        return super().forward(hidden_states) if found is None else found


class CLIPMLP(FeedForward):
    """``fc2(activation_fn(fc1(x)))``: CLIP, ViT and many others."""

    proof = {"forward": ("769d85c891103abf",)}

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        return feed_forward(x, self.fc1, self.activation_fn, self.fc2, residual)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "activation_fn")


class GPT2MLP(FeedForward):
    """``dropout(c_proj(act(c_fc(x))))``."""

    proof = {"forward": ("56ba74c08d1aaf75",)}

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        if not is_plain(self.dropout, torch.nn.Dropout):
            return None
        if self.dropout.p == 0 or not self.dropout.training:
            return feed_forward(x, self.c_fc, self.act, self.c_proj, residual)
        out = feed_forward(x, self.c_fc, self.act, self.c_proj)
        if out is None:
            return None
        out = dropout(out, self.dropout.p)
        return out if residual is None else residual + out

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "act")


class LlamaMLP(FeedForward):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``: most families of decoders."""

    proof = {"forward": ("8f230413d2b1ea56",)}
    operations = "gated_feed_forward"

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        gate, up = linear_weights(self.gate_proj), linear_weights(self.up_proj)
        return gated_feed_forward(x, gate, up, self.act_fn, self.down_proj, residual)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "act_fn")


class Phi3MLP(FeedForward):
    """``down_proj(up * activation_fn(gate))`` with both halves in one layer, gate_up_proj."""

    proof = {"forward": ("421e6ed62e1deaf1",)}
    operations = "gated_feed_forward"

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        both = linear_weights(self.gate_up_proj)
        if both is None or len(both[0]) % 2:
            return None
        biases = (None, None) if both[1] is None else both[1].chunk(2)
        gate, up = zip(both[0].chunk(2), biases, strict=True)
        return gated_feed_forward(x, gate, up, self.activation_fn, self.down_proj, residual)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "activation_fn")


class T5DenseActDense(FeedForward):
    """``wo(dropout(act(wi(x))))``."""

    proof = {"forward": ("717ea231fca90b3a",)}

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        if not is_plain(self.dropout, torch.nn.Dropout):
            return None
        drop = self.dropout.p if self.dropout.training else 0.0
        return feed_forward(x, self.wi, self.act, self.wo, residual, drop)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "act")


class T5DenseGatedActDense(T5DenseActDense):
    """``wo(dropout(act(wi_0(x)) * wi_1(x)))``."""

    proof = {"forward": ("9378f05b19067ad5",)}
    operations = "gated_feed_forward"

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        if not is_plain(self.dropout, torch.nn.Dropout):
            return None
        drop = self.dropout.p if self.dropout.training else 0.0
        gate, up = linear_weights(self.wi_0), linear_weights(self.wi_1)
        return gated_feed_forward(x, gate, up, self.act, self.wo, residual, drop)


class T5LayerFF(Fused):
    """``x + dropout(DenseReluDense(layer_norm(x)))``."""

    proof = {"forward": ("f7937eb9b6abe1a0",)}
    operations = "feed_forward with residual"

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not is_plain(self.dropout, torch.nn.Dropout) or (self.dropout.p and self.dropout.training):
            return super().forward(hidden_states)
        return add_output(self.DenseReluDense, self.layer_norm(hidden_states), hidden_states)


# ---- BERT ------------------------------------------------------------------------------------------------------------


class _BertDense(Fused):
    """``activation(dense(x))``: bias and activation in one pass."""

    operations = "bias_activation"
    activation: ClassVar[str]

    def activated(self, x: Tensor) -> Tensor | None:
        name, weights = activation_name(getattr(self, self.activation)), linear_weights(self.dense)
        if name is None or weights is None or not fits(x, *weights):
            return None
        hidden, bias = functional.linear(x, weights[0]), weights[1]
        return functional.bias_activation(hidden, None if bias is None else bias.to(hidden.dtype), name)


class BertIntermediate(_BertDense):
    proof = {"forward": ("5ab127057c1c3922",)}
    activation = "intermediate_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.activated(hidden_states)
        return super().forward(hidden_states) if found is None else found

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "intermediate_act_fn")


class BertPredictionHeadTransform(_BertDense):
    proof = {"forward": ("421b95c1827f0329",)}
    activation = "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.activated(hidden_states)
        return super().forward(hidden_states) if found is None else self.LayerNorm(found)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return _unless_activation(module, "transform_act_fn")


class BertOutput(Fused):
    """``LayerNorm(dropout(dense(x)) + residual)``, all but the matmul in one pass."""

    proof = {"forward": ("501706bcbb6ba9e8",)}  # BertOutput, BertSelfOutput
    operations = "add_layer_norm"

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.finish(self.dense(hidden_states), input_tensor)

    def finish(self, out: Tensor, residual: Tensor) -> Tensor:
        out, dropout_p = pending_dropout(self.dropout, out)
        return add_norm(self.LayerNorm, out, residual, dropout_p)[0]


class BertLayer(Fused):
    """``output(intermediate(x), x)``: the feed-forward block as one operation, then :class:`BertOutput`'s pass."""

    proof = {"feed_forward_chunk": ("39ce868f45b8e008",)}
    operations = "feed_forward, add_layer_norm"

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        first, second = self.intermediate, self.output
        if isinstance(first, BertIntermediate) and isinstance(second, BertOutput) and untouched(first, second):
            out = feed_forward(attention_output, first.dense, first.intermediate_act_fn, second.dense)
            if out is not None:
                return second.finish(out, attention_output)
        return super().feed_forward_chunk(attention_output)


class BertEmbeddings(Fused):
    """``dropout(LayerNorm(word + position + token_type))``: three tables, the norm and dropout in one pass."""

    proof = {"forward": ("db5e734462ae7be0",)}
    operations = "transformer_embedding"

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        norm, drop = self.LayerNorm, self.dropout
        if (
            input_ids is None
            or inputs_embeds is not None
            or not all(is_plain(table, torch.nn.Embedding, nn.Embedding) and _is_simple(table) for table in tables)
            or any(table.padding_idx is not None for table in tables[1:])
            or not (is_plain(norm, torch.nn.LayerNorm, nn.LayerNorm) and is_plain(drop, torch.nn.Dropout))
            or not fits(tables[0].weight, tables[1].weight, tables[2].weight, norm.weight, norm.bias)
        ):
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        if position_ids is None:
            position_ids = self.position_ids[:, past_key_values_length : input_ids.shape[1] + past_key_values_length]
        return functional.transformer_embedding(
            input_ids,
            *(table.weight for table in tables),
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            padding_idx=tables[0].padding_idx,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
            dropout_p=drop.p,
            training=drop.training,
        )

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        segments = getattr(module, "token_type_ids", None)
        if segments is not None and not segments.is_meta and segments.any():
            return "its buffer token_type_ids is not zero"
        return None


def _is_simple(table: torch.nn.Embedding) -> bool:
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


# ---- layers ----------------------------------------------------------------------------------------------------------


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
        if is_plain(self.dropout, torch.nn.Dropout) and not dropout_p:
            return add_output(self.mlp, normed, summed)
        return self.dropout(self.mlp(normed)) + summed


LAYERS: tuple[type[Fused], ...] = (
    RMSNorm,
    RMSNormInFloat,
    GemmaRMSNorm,
    Activation,
    Conv1D,
    CLIPMLP,
    GPT2MLP,
    LlamaMLP,
    Phi3MLP,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerFF,
    BertIntermediate,
    BertPredictionHeadTransform,
    BertOutput,
    BertLayer,
    BertEmbeddings,
    LlamaDecoderLayer,
    GPT2Block,
    CLIPEncoderLayer,
    ViTLayer,
)
