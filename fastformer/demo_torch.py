"""The demo's opponent: the same GPT-2 from the parts of ``torch.nn``, written as one would.

Fused query-key-value projection, ``F.scaled_dot_product_attention`` (PyTorch's flash kernel, causal),
``nn.LayerNorm``, ``nn.GELU``, tied embeddings, ``nn.CrossEntropyLoss``; generation with a preallocated KV cache. It
reads the weights of a :class:`fastformer.models.GPT2LMHeadModel` and gives the same logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, position: int = 0) -> Tensor:
        """x (B, S, E); cache: (B, H, capacity, D) keys and values, of which ``position`` are filled."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            keys, values = cache
            keys[:, :, position : position + length] = k
            values[:, :, position : position + length] = v
            k, v = keys[:, :, : position + length], values[:, :, : position + length]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward(self.norm_2(x))


class TorchGPT2(nn.Module):
    """GPT-2 with a tied language-model head.

    Args:
        vocab_size, positions, width, layers, heads: the shape.
        eps: of the layer norms.
    """

    def __init__(self, vocab_size: int, positions: int, width: int, layers: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.token.weight
        self.criterion = nn.CrossEntropyLoss()
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("out.weight", "feed_forward.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def like(cls, model: nn.Module) -> TorchGPT2:
        """The same network as a :class:`fastformer.models.GPT2LMHeadModel`, with a copy of its weights."""
        config = model.config
        twin = cls(
            config.vocab_size,
            config.n_positions,
            config.n_embd,
            config.n_layer,
            config.n_head,
            config.layer_norm_epsilon,
        )
        weights = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
        names = {"token": "wte", "position": "wpe", "norm": "ln_f"}
        parts = {
            "norm_1": "ln_1",
            "qkv": "attn.c_attn",
            "out": "attn.c_proj",
            "norm_2": "ln_2",
            "feed_forward.0": "mlp.c_fc",
            "feed_forward.2": "mlp.c_proj",
        }
        for layer in range(config.n_layer):
            names |= {f"blocks.{layer}.{ours}": f"h.{layer}.{theirs}" for ours, theirs in parts.items()}
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                module, kind = name.rsplit(".", 1)
                source = weights[f"{names[module]}.{kind}"]
                # GPT-2's checkpoints hold its linear layers as (in, out).
                transposed = isinstance(twin.get_submodule(module), nn.Linear) and kind == "weight"
                parameter.copy_(source.T if transposed else source)
        return twin.to(next(model.parameters()).device)

    def forward(
        self, ids: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None, position: int = 0, last: bool = False
    ) -> Tensor:
        """Logits (B, S, V) for ids (B, S), or only those of the last position, (B, 1, V)."""
        positions = torch.arange(position, position + ids.shape[1], device=ids.device)
        x = self.token(ids) + self.position(positions)
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[index], position)
        return self.head(self.norm(x[:, -1:] if last else x))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (B, S)."""
        return self.criterion(self(ids).flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation of ids (B, S), one new token a pass over a KV cache: (B, S + max_new_tokens)."""
        batch, length = ids.shape
        weight = self.token.weight
        heads = self.blocks[0].heads
        shape = (batch, heads, length + max_new_tokens, weight.shape[1] // heads)
        cache = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.blocks]
        result = ids.new_empty(batch, length + max_new_tokens)
        result[:, :length] = ids
        for end in range(length, length + max_new_tokens):
            start = 0 if end == length else end - 1
            logits = self(result[:, start:end], cache, start, last=True)
            result[:, end] = logits[:, -1].argmax(-1)
        return result
