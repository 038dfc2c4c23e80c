"""BERT and its relatives: what follows a sublayer's last matmul is one pass, and so is the embedding.

As in _layers.py, the classes have no state, and ``super()`` is the original code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import functional, nn
from ..nn.submodules import is_plain, pending_dropout
from ._layers import add_norm, unless_activation
from ._parts import Fused, activation_name, feed_forward, fits, linear_weights, untouched


class BertDense(Fused):
    """``activation(dense(x))``: bias and activation in one pass."""

    operations = "bias_activation"
    activation: ClassVar[str]

    def activated(self, x: Tensor) -> Tensor | None:
        name, weights = activation_name(getattr(self, self.activation)), linear_weights(self.dense)
        if name is None or weights is None or not fits(x, *weights):
            return None
        hidden, bias = functional.linear(x, weights[0]), weights[1]
        return functional.bias_activation(hidden, None if bias is None else bias.to(hidden.dtype), name)


class BertIntermediate(BertDense):
    proof = {"forward": ("5ab127057c1c3922",)}
    activation = "intermediate_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.activated(hidden_states)
        return super().forward(hidden_states) if found is None else found

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return unless_activation(module, "intermediate_act_fn")


class BertPredictionHeadTransform(BertDense):
    proof = {"forward": ("421b95c1827f0329",)}
    activation = "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.activated(hidden_states)
        return super().forward(hidden_states) if found is None else self.LayerNorm(found)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return unless_activation(module, "transform_act_fn")


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
        if input_ids is None or inputs_embeds is not None or not self._may_be_read():
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        if position_ids is None:
            position_ids = self.positions_of(input_ids, past_key_values_length)
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        norm, drop = self.LayerNorm, self.dropout
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

    def positions_of(self, input_ids: Tensor, past: int) -> Tensor:
        return self.position_ids[:, past : past + input_ids.shape[1]]

    def _may_be_read(self) -> bool:
        tables, norm = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings), self.LayerNorm
        if not (is_plain(norm, torch.nn.LayerNorm, nn.LayerNorm) and is_plain(self.dropout, torch.nn.Dropout)):
            return False
        for table in tables:
            plain = is_plain(table, torch.nn.Embedding, nn.Embedding)
            if not plain or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
                return False
        recorded = torch.is_grad_enabled()
        for table in tables[1:]:  # the kernel leaves a gradient out of the first table alone
            if table.padding_idx is not None and recorded and table.weight.requires_grad:
                return False
        return fits(*(table.weight for table in tables), norm.weight, norm.bias)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        segments = getattr(module, "token_type_ids", None)
        if segments is not None and not segments.is_meta and segments.any():
            return "its buffer token_type_ids is not zero"
        return None


class RobertaEmbeddings(BertEmbeddings):
    """Positions count from the padding on, and their table has a padding row: training runs as it was."""

    proof = {"forward": ("d17e77722b0d7385",)}

    def positions_of(self, input_ids: Tensor, past: int) -> Tensor:
        return self.create_position_ids_from_input_ids(input_ids, self.padding_idx, past)


class DistilBertFFN(Fused):
    """``dropout(lin2(activation(lin1(x))))``, called in chunks of the sequence."""

    proof = {"ff_chunk": ("8e428fd723d2f0af",)}
    operations = "feed_forward"

    def ff_chunk(self, input: Tensor) -> Tensor:
        out = feed_forward(input, self.lin1, self.activation, self.lin2)
        return super().ff_chunk(input) if out is None else self.dropout(out)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return unless_activation(module, "activation")


class DistilBertLayer(Fused):
    """Attention and feed-forward, each followed by addition and norm in one pass."""

    proof = {"forward": ("a956c31ab6438c9a",)}
    operations = "add_layer_norm"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        normed, _ = add_norm(self.sa_layer_norm, attended, hidden_states)
        return add_norm(self.output_layer_norm, self.ffn(normed), normed)[0]


LAYERS: tuple[type[Fused], ...] = (
    BertIntermediate,
    BertPredictionHeadTransform,
    BertOutput,
    BertLayer,
    BertEmbeddings,
    RobertaEmbeddings,
    DistilBertFFN,
    DistilBertLayer,
)
