"""Norms and feed-forward blocks of transformers as fused forwards, each for every class whose ``forward`` has the
fingerprint it names; BERT's layers are in _layers_bert.py, whole layers in _layers_blocks.py.

A class here stands before the original one in the bases of the class that :func:`fastformer.optimize` makes of the two.
It has no state: parameters, submodules and their names are the original's. Where a submodule may not be read
(_parts.py), ``super().forward`` is the original code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .. import functional
from ..nn.norm import add_norm as nn_add_norm
from ..nn.norm import add_residual
from ..nn.submodules import is_plain
from ._parts import (
    Activation,
    Conv1D,
    Fused,
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


def add_dropped_output(module: torch.nn.Module, drop: torch.nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + drop(module(x))``."""
    if is_plain(drop, torch.nn.Dropout) and not (drop.training and drop.p):
        return add_output(module, x, residual)
    return residual + drop(module(x))


def unless_activation(module: torch.nn.Module, attribute: str) -> str | None:
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
        return unless_activation(module, "activation_fn")


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
        return unless_activation(module, "act")


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
        return unless_activation(module, "act_fn")


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
        return unless_activation(module, "activation_fn")


class GPTNeoXMLP(FeedForward):
    """``dense_4h_to_h(act(dense_h_to_4h(x)))``."""

    proof = {"forward": ("20a9043c95d19dcd",)}

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        return feed_forward(x, self.dense_h_to_4h, self.act, self.dense_4h_to_h, residual)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return unless_activation(module, "act")


class Wav2Vec2FeedForward(FeedForward):
    """``output_dropout(output_dense(intermediate_dropout(intermediate_act_fn(intermediate_dense(x)))))``."""

    proof = {"forward": ("5a95ad6f7f6cbe43",)}

    def block(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        inner = self.intermediate_dropout
        if residual is not None or not is_plain(inner, torch.nn.Dropout):
            return None
        drop = inner.p if inner.training else 0.0
        out = feed_forward(x, self.intermediate_dense, self.intermediate_act_fn, self.output_dense, None, drop)
        return None if out is None else self.output_dropout(out)

    @staticmethod
    def unless(module: torch.nn.Module) -> str | None:
        return unless_activation(module, "intermediate_act_fn")


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
        return unless_activation(module, "act")


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
        return add_dropped_output(self.DenseReluDense, self.dropout, self.layer_norm(hidden_states), hidden_states)


LAYERS: tuple[type[Fused], ...] = (
    RMSNorm,
    RMSNormInFloat,
    GemmaRMSNorm,
    Activation,
    Conv1D,
    CLIPMLP,
    GPT2MLP,
    GPTNeoXMLP,
    Wav2Vec2FeedForward,
    LlamaMLP,
    Phi3MLP,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerFF,
)
