"""Keys and values of the tokens a decoder has already seen, ``(B, H, capacity, D)`` per layer.

Each step writes its new columns in place and attends over a view, so a step costs one small copy whatever the length;
concatenating instead would copy the whole cache for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One (key, value) pair of buffers per layer, filled from the left.

    Args:
        num_layers: layers that will write into it.
        max_length: positions to allocate at once, and the limit. None grows the buffers as needed, doubling them.

    The buffers take shape, dtype and device from the first keys and values written. Gradients flow through a cache
    (the buffers are then concatenated instead of written into), at the cost of that copy.
    """

    def __init__(self, num_layers: int, max_length: int | None = None) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: {num_layers} is not positive")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: {max_length} is not positive")
        self.max_length = max_length
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.lengths = [0] * num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions stored."""
        return self.lengths[layer_idx]

    def get_max_length(self) -> int | None:
        """Number of positions there is room for, None if it grows."""
        return self.max_length

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends key and value ``(B, H, S, D)`` (any strides) and returns all of them, ``(B, H, length, D)`` views.

        Raises:
            ValueError: no room left, or a batch size, head count or head dim other than the first call's.
        """
        start = self.lengths[layer_idx]
        end = start + key.shape[2]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"past_key_values: {end} positions do not fit into a cache of {self.max_length}")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            keys, values = self._append(self.keys, key, layer_idx), self._append(self.values, value, layer_idx)
        else:
            self.keys[layer_idx] = keys = self._room(self.keys[layer_idx], key, start, end)
            self.values[layer_idx] = values = self._room(self.values[layer_idx], value, start, end)
            keys[:, :, start:end] = key
            values[:, :, start:end] = value
        self.lengths[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def stored(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer that has some, ``(B, H, length, D)`` views."""
        keys, values, end = self.keys[layer_idx], self.values[layer_idx], self.lengths[layer_idx]
        assert keys is not None and values is not None
        return keys[:, :, :end], values[:, :, :end]

    def _append(self, buffers: list[Tensor | None], new: Tensor, layer_idx: int) -> Tensor:
        old = buffers[layer_idx]
        joined = new if old is None else torch.cat((old[:, :, : self.lengths[layer_idx]], new), 2)
        buffers[layer_idx] = joined
        return joined

    def _room(self, buffer: Tensor | None, new: Tensor, start: int, end: int) -> Tensor:
        batch, heads, _, head_dim = new.shape
        if buffer is not None:
            if (buffer.shape[0], buffer.shape[1], buffer.shape[3]) != (batch, heads, head_dim):
                raise ValueError(
                    f"past_key_values: holds (B, H, S, D) = {tuple(buffer.shape)}, got keys of {tuple(new.shape)}"
                )
            # A buffer that autograd may have saved (made by _append) must not be written into.
            if buffer.shape[2] >= end and not buffer.requires_grad:
                return buffer
        capacity = self.max_length or (end if buffer is None else max(end, 2 * buffer.shape[2]))
        grown = new.new_empty(batch, heads, capacity, head_dim)
        if buffer is not None:
            grown[:, :, :start] = buffer[:, :, :start].detach()
        return grown

    def reorder(self, indices: Tensor, start: int = 0) -> None:
        """Replaces sequence i by sequence ``indices[i]``, for beam search and for dropping finished sequences.

        With as many sequences as before it happens in place, where a kernel may hold the buffers' addresses, and for
        the positions from ``start`` on only: beams of one prompt share those before.
        """
        moved = sources = indices
        if indices.device.type == "cpu":  # elsewhere it would have to wait for the device
            moved = (indices != torch.arange(len(indices))).nonzero()[:, 0]
            sources = indices[moved]
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                if buffer is None:
                    continue
                if len(indices) != len(buffer) or buffer.requires_grad:
                    buffers[i] = buffer.index_select(0, indices)
                    continue
                part = buffer[:, :, start : self.lengths[i]]
                rows = part.index_select(0, sources)
                if moved is indices:
                    part.copy_(rows)
                elif len(moved):
                    part.index_copy_(0, moved, rows)

    def repeat(self, repeats: int) -> None:
        """Every sequence so many times, copies side by side: one prompt, computed once, for several continuations."""
        if repeats == 1:
            return
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                if buffer is None:
                    continue
                batch, heads, capacity, head_dim = buffer.shape
                grown = buffer.new_empty(batch, repeats, heads, capacity, head_dim)
                length = self.lengths[i]
                grown[:, :, :, :length] = buffer[:, None, :, :length].detach()
                buffers[i] = grown.flatten(0, 1)

    def crop(self, length: int) -> None:
        """Forgets every position from ``length`` on."""
        if length < 0:
            raise ValueError(f"length: {length} is negative")
        self.lengths = [min(length, n) for n in self.lengths]

    def reset(self) -> None:
        """Forgets everything and keeps the buffers."""
        self.lengths = [0] * len(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


class EncoderDecoderCache:
    """The two caches of a decoder that also attends to an encoder's output.

    Attributes:
        self_attention_cache: keys and values of the tokens so far.
        cross_attention_cache: keys and values of the encoder's output, written once per layer.
    """

    def __init__(self, self_attention_cache: KVCache, cross_attention_cache: KVCache) -> None:
        if len(self_attention_cache) != len(cross_attention_cache):
            raise ValueError(
                f"cross_attention_cache: has {len(cross_attention_cache)} layers, self_attention_cache"
                f" {len(self_attention_cache)}"
            )
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache

    @classmethod
    def with_layers(cls, num_layers: int, max_length: int | None = None) -> EncoderDecoderCache:
        """Empty caches; ``max_length`` is the decoder's."""
        return cls(KVCache(num_layers, max_length), KVCache(num_layers))

    def is_updated(self, layer_idx: int) -> bool:
        """Whether the encoder's keys and values of this layer are there."""
        return self.cross_attention_cache.get_seq_length(layer_idx) > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of the decoder's positions stored."""
        return self.self_attention_cache.get_seq_length(layer_idx)

    def get_max_length(self) -> int | None:
        """Number of the decoder's positions there is room for, None if it grows."""
        return self.self_attention_cache.get_max_length()

    def reorder(self, indices: Tensor, start: int = 0) -> None:
        """Replaces sequence i by sequence ``indices[i]`` in both.

        With a ``start``, the positions before it are the same in both sequences, and so is what the encoder was given.
        """
        self.self_attention_cache.reorder(indices, start)
        if start == 0:
            self.cross_attention_cache.reorder(indices)

    def repeat(self, repeats: int) -> None:
        """Every sequence so many times, copies side by side."""
        self.self_attention_cache.repeat(repeats)
        self.cross_attention_cache.repeat(repeats)

    def crop(self, length: int) -> None:
        """Forgets every position of the decoder from ``length`` on."""
        self.self_attention_cache.crop(length)

    def reset(self) -> None:
        """Forgets everything and keeps the buffers."""
        self.self_attention_cache.reset()
        self.cross_attention_cache.reset()

    def __len__(self) -> int:
        return len(self.self_attention_cache)
