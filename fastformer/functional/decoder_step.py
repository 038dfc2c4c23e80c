"""One token through a whole GPT-2 decoder in one kernel call: generation at small batch on a CPU.

Per layer x += proj(attention(ln_1(x))) and x += fc2(gelu(fc1(ln_2(x)))), with a key/value cache, then the logits. Every
weight is read once per token and nothing else costs time: no dispatch between layers, no temporaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.cpu import unavailable
from . import _checks

MAX_BATCH = 8  # beyond that the layers' own matmuls use the weights better


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer, float32 on the CPU, in the layout of GPT-2's checkpoints: matrices are (in, out)."""

    ln1_weight: Tensor  # (E)
    ln1_bias: Tensor
    qkv_weight: Tensor  # (E, 3E)
    qkv_bias: Tensor
    proj_weight: Tensor  # (E, E)
    proj_bias: Tensor
    ln2_weight: Tensor  # (E)
    ln2_bias: Tensor
    fc1_weight: Tensor  # (E, F)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (F, E)
    fc2_bias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in the order of ff_decoder_layer."""
        return tuple(vars(self).values())


def supported(batch: int, tensors: Sequence[Tensor]) -> str | None:
    """Why :class:`DecoderStep` cannot run with these weights, or None."""
    if batch > MAX_BATCH:
        return f"batch {batch} is over {MAX_BATCH}"
    if unavailable("cpu"):
        return unavailable("cpu")
    for t in tensors:
        if t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous():
            return "a weight is not a contiguous float32 tensor on the CPU"
    return None


class DecoderStep:
    """Holds the addresses of a model's weights and of its cache; :meth:`__call__` advances every sequence by a token.

    Args:
        layers: the weights of each layer.
        wte, wpe: token ``(V, E)`` and position ``(P, E)`` embeddings.
        ln_f_weight, ln_f_bias: final norm ``(E)``.
        head_weight: ``(V, E)``.
        caches: per layer (keys, values), each ``(B, H, max_length, D)`` contiguous, written in place.
        attention_scale: per layer, multiplies the scores.
        eps: of the norms.
        tanh: the GELU form.

    Raises:
        ValueError: weights or caches that :func:`supported` refuses, or whose shapes do not fit.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        wte: Tensor,
        wpe: Tensor,
        ln_f_weight: Tensor,
        ln_f_bias: Tensor,
        head_weight: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        attention_scale: Sequence[float],
        eps: float,
        tanh: bool,
    ) -> None:
        from ..backends.cpu import decoder_step as kernel  # here, so that a machine without the kernels can import this

        tensors = [t for layer, cache in zip(layers, caches, strict=True) for t in (*layer.tensors(), *cache)]
        self._alive = [*tensors, wte, wpe, ln_f_weight, ln_f_bias, head_weight]
        batch, heads, max_length, head_dim = caches[0][0].shape
        reason = supported(batch, self._alive)
        if reason:
            raise ValueError(f"layers: {reason}")
        hidden = heads * head_dim
        _checks.parameter("wte", wte, (wte.shape[0], hidden), "caches", caches[0][0])
        _checks.parameter("head_weight", head_weight, (head_weight.shape[0], hidden), "caches", caches[0][0])
        for i, layer in enumerate(layers):
            width = layer.fc1_bias.shape[0]
            shapes = (
                *((hidden,), (hidden,), (hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)),
                *((hidden,), (hidden,), (hidden, width), (width,), (width, hidden), (hidden,)),
            )
            for (name, t), shape in zip(vars(layer).items(), shapes, strict=True):
                _checks.parameter(f"layers[{i}].{name}", t, shape, "caches", caches[0][0])
        self.batch, self.max_length, self.positions = batch, max_length, wpe.shape[0]
        self.vocab_size = head_weight.shape[0]
        self._pointers = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
        self._scale = torch.tensor(list(attention_scale), dtype=torch.float64)
        self._sizes = (batch, len(layers), hidden, heads, layers[0].fc1_bias.shape[0], self.vocab_size, max_length)
        self._workspace = torch.empty(kernel.workspace_size(*self._sizes), dtype=torch.uint8)
        self._constants = (eps, tanh)
        self._weights = (
            wte.data_ptr(),
            wpe.data_ptr(),
            self._pointers.data_ptr(),
            self._scale.data_ptr(),
            ln_f_weight.data_ptr(),
            ln_f_bias.data_ptr(),
            head_weight.data_ptr(),
        )
        self._run = kernel.run

    def __call__(self, tokens: Tensor, positions: Tensor, length: int, cache_start: Tensor | None = None) -> Tensor:
        """Appends ``tokens`` to the cache at index ``length`` and returns the logits for the next one.

        Args:
            tokens: ``(B)`` int64.
            positions: ``(B)`` int64, rows of wpe.
            length: tokens already in the cache.
            cache_start: ``(B)`` int64, first cached index each sequence may see; None = 0.

        Returns:
            ``(B, V)`` float32.

        Raises:
            ValueError: a token, position, start or length out of range, before anything is written.
        """
        for name, t in (("tokens", tokens), ("positions", positions), ("cache_start", cache_start)):
            if t is not None and (t.dtype != torch.int64 or t.shape != (self.batch,) or not t.is_contiguous()):
                raise ValueError(f"{name}: expected ({self.batch},) contiguous int64, got {tuple(t.shape)} {t.dtype}")
        if int(positions.max()) >= self.positions:
            raise ValueError(f"positions: {int(positions.max())} is not in [0, {self.positions})")
        logits = torch.empty(self.batch, self.vocab_size)
        self._run(
            *self._sizes,
            *self._constants,
            length,
            0 if cache_start is None else cache_start.data_ptr(),
            tokens.data_ptr(),
            positions.data_ptr(),
            *self._weights,
            logits.data_ptr(),
            self._workspace.data_ptr(),
        )
        return logits
