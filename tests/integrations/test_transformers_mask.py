"""A described mask is the table that transformers would store, whatever is done with it."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from transformers import masking_utils as masking

import fastformer.functional as F
from fastformer.integrations import transformers_mask
from fastformer.integrations.transformers_attention import attention_forward
from fastformer.integrations.transformers_mask import Pattern, StructuredMask, attention_mask, recognise

FUNCTIONS = {
    "causal": masking.causal_mask_function,
    "window of 1": masking.sliding_window_causal_mask_function(1),
    "window of 3": masking.sliding_window_causal_mask_function(3),
    "both ways": masking.bidirectional_mask_function,
    "window both ways": masking.sliding_window_bidirectional_mask_function(2),
}
# (Sq, Sk, offset of the queries, offset of the keys)
SHAPES = [
    (5, 5, 0, 0),  # no cache
    (1, 6, 5, 0),  # decoding
    (3, 7, 4, 0),  # a second piece of a prompt
    (4, 9, 0, 0),  # a static cache, empty
    (3, 9, 2, 0),  # a static cache with keys and with room
    (2, 4, 7, 5),  # a cache that has dropped what left the window
    (3, 6, 0, 0),  # an encoder's keys
    (4, 2, 0, 0),  # fewer keys than queries
]
PADDING = [None, "left", "right", "some", "all of one sequence", "shorter than the keys"]


def visible_of(kind, sk, kv_offset):
    if kind is None:
        return None
    visible = torch.rand(2, sk + kv_offset, generator=torch.Generator().manual_seed(sk)) < 0.6
    if kind in ("left", "right"):
        visible = torch.ones_like(visible)
        visible[0, :2] = visible[1, : kv_offset + 1] = False
        return visible if kind == "left" else visible.flip(1)
    if kind == "all of one sequence":
        visible[1] = False
    return visible[:, :-1] if kind == "shorter than the keys" else visible


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_attention_sees_what_the_table_shows(name, kind):
    structured = spans = 0
    for sq, sk, q_offset, kv_offset in SHAPES:
        arguments = {
            "batch_size": 2,
            "q_length": sq,
            "kv_length": sk,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": FUNCTIONS[name],
            "attention_mask": visible_of(kind, sk, kv_offset),
        }
        table = masking.sdpa_mask(**arguments, allow_is_causal_skip=False)
        mask = attention_mask(**arguments, allow_is_bidirectional_skip="both" in name)
        q, k = torch.randn(2, 1, sq, 4, dtype=torch.float64), torch.randn(2, 1, sk, 4, dtype=torch.float64)
        wanted = F.attention(q, k, k, attn_mask=table)
        if isinstance(mask, StructuredMask):
            structured += 1
            assert mask.shape == table.shape and torch.equal(mask & True, table)
            p = mask.pattern
            key = k[:, :, : p.keys]
            padding = p.key_padding_mask
            ours = F.attention(q, key, key, causal=p.causal, window=p.window, key_padding_mask=padding)
            if p.span is not None:
                spans += 1
                begin, end = p.span
                decoded = F.decode_attention(q, k, k, end, causal=p.causal, window=p.window, cache_leftpad=begin)
                torch.testing.assert_close(decoded, wanted, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(mask, table)
            continue
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    assert spans >= (4 if kind == "left" else 2 if kind == "right" and "window" not in name and name != "causal" else 0)
    assert structured >= (1 if name == "causal" else 3)


def test_patterns_are_recognised_by_what_they_are():
    assert recognise(FUNCTIONS["causal"]) == Pattern(causal=True)
    assert recognise(FUNCTIONS["window of 3"]) == Pattern(True, (2, 0))
    assert recognise(FUNCTIONS["both ways"]) == Pattern()
    assert recognise(FUNCTIONS["window both ways"]) == Pattern(False, (2, 2))
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]])
    packed = masking.packed_sequence_compatibility_function(FUNCTIONS["window of 3"], positions, documents)
    found = recognise(packed)
    assert found[:2] == (True, (2, 0)) and found.cu_seqlens.tolist() == [0, 2, 5, 6, 7, 10]
    for unknown in (
        lambda b, h, q, k: k <= q,
        masking.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)),
        masking.or_masks(FUNCTIONS["causal"], FUNCTIONS["both ways"]),
        masking.and_masks(FUNCTIONS["causal"], lambda b, h, q, k: q - k < 2),
        masking.and_masks(FUNCTIONS["causal"], masking.sliding_window_overlay(3)),  # right, and not how it is written
        masking.sliding_window_causal_mask_function(torch.tensor(3)),
    ):
        assert recognise(unknown) is None


def made(**changes):
    visible = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    return attention_mask(2, 4, 6, 2, 0, attention_mask=visible, **changes)


def test_anything_that_reads_it_reads_the_table(monkeypatch):
    tables, make = [], masking.sdpa_mask
    monkeypatch.setattr(transformers_mask.masking, "sdpa_mask", lambda **k: tables.append(1) or make(**k))
    mask, table = (
        made(),
        make(2, 4, 6, 2, 0, attention_mask=torch.arange(12).view(2, 6) != 0, allow_is_causal_skip=False),
    )
    assert isinstance(mask, StructuredMask) and isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.dim(), mask.dtype, mask.device) == (table.shape, 4, torch.bool, table.device)
    assert "causal=True" in repr(mask) and mask.to("cpu") is mask and not tables
    for read in (
        lambda m: m[:, :, 1:, ::2],
        lambda m: ~m,
        lambda m: torch.where(m, 0.0, float("-inf")),
        lambda m: m.expand(2, 3, 4, 6),
        lambda m: torch.cat((m, m), dim=-1),
        lambda m: m.float().mean(),
        lambda m: torch.nn.functional.pad(m, (0, 3)),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ):
        found = read(mask)
        assert type(found) is torch.Tensor and torch.equal(found, read(table))
    assert mask.untouched() and tables == [1]


WRITES = {
    "an element": lambda m: m.__setitem__((0, 0, 0, 5), True),
    "a slice": lambda m: m[:, :, 1:].__setitem__((..., 0), True),
    "all": lambda m: m.fill_(True),
    "a chunk": lambda m: m.chunk(2)[0].logical_not_(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_into_it_counts(name, inference):
    with torch.inference_mode(inference):
        mask, table = made(), made(allow_is_causal_skip=False)
        assert type(table) is torch.Tensor
        WRITES[name](mask)
        WRITES[name](table)
        assert not mask.untouched() and torch.equal(mask & True, table)


def test_where_a_table_is_asked_for_there_is_one():
    for q, kv, skip in itertools.product((1, 4), (4, 6), (False, True)):
        mask = attention_mask(2, q, kv, kv - q, 0, allow_is_causal_skip=skip)
        if skip:
            assert isinstance(mask, StructuredMask) and mask.pattern == Pattern(causal=True)
        else:
            assert type(mask) is torch.Tensor


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_seen_does_not_depend_on_the_layer(causal):
    """Some layers call themselves causal, or not, and are called with the other kind of mask."""
    layer = torch.nn.Module()
    layer.is_causal = not causal
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    function = FUNCTIONS["causal" if causal else "both ways"]
    mask = attention_mask(1, 5, 5, mask_function=function, allow_is_bidirectional_skip=not causal)
    found = attention_forward(layer, q, k, k, mask)[0].transpose(1, 2)
    torch.testing.assert_close(found, F.attention(q, k, k, causal=causal))


def test_a_static_cache_counts_with_a_tensor():
    mask = attention_mask(2, 3, 9, torch.tensor(2), 0)
    assert mask.pattern == Pattern(causal=True, keys=5)
