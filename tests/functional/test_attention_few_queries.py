"""Attention of a few queries without gradients, which on a CPU reads keys and values as they lie, whatever is added."""

from __future__ import annotations

import importlib
import random

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import functional as F
from fastformer.backends.attention_options import Options
from fastformer.backends.cpu import attention as cpu
from fastformer.backends.reference import attention as reference
from tests.attention_formula import attention_formula
from tests.functional.test_attention_features import (
    FEATURE_CASES,
    HKV,
    HQ,
    B,
    converted,
    in_double,
    normal,
    random_call,
    some,
)
from tests.numerics import assert_close_to_fp64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNELS = ["_C generic", "_C avx2", "_C avx512", "_C_wide avx512"]


def padding(*ignored: tuple[int, int], keys: int) -> Tensor:
    """(1, keys), True in the ranges."""
    mask = torch.zeros(1, keys, dtype=torch.bool)
    for begin, end in ignored:
        mask[:, begin:end] = True
    return mask


# (2, Sk) each: two sequences, so that what is kept of one cannot pass for the other's.
PADDING = {
    "at the end, at the beginning": lambda n: torch.cat([padding((n - 9, n), keys=n), padding((0, 5), keys=n)]),
    "holes": lambda n: some(B, n),
    "one key left, none left": lambda n: torch.cat(
        [padding((0, n // 2), (n // 2 + 1, n), keys=n), padding((0, n), keys=n)]
    ),
    "whole blocks": lambda n: torch.cat([padding((3, n * 2 // 3), keys=n), padding((0, n // 3), (n // 2, n), keys=n)]),
    "none": lambda n: torch.zeros(B, n, dtype=torch.bool),
}

# (Sq, Sk, D, Dv), two query heads to each of two key/value heads
SHAPES = {
    "one query": (1, 131, 40, 24),  # tails of every vector
    "two queries, several parts to merge": (2, 1100, 8, 16),
    "three queries": (3, 50, 16, 16),
    "eight queries": (8, 70, 16, 16),  # too many for this way where two heads share one of the keys
    "more queries than keys": (2, 1, 5, 3),
}


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, kv_heads: int = HKV) -> list[Tensor]:
    sq, sk, d, dv = shape
    qkv = [normal(B, HQ, sq, d), normal(B, kv_heads, sk, d, seed=1), normal(B, kv_heads, sk, dv, seed=2)]
    return [t.to(dtype) for t in qkv]


def check(qkv: list[Tensor], arguments: dict) -> None:
    dtype = qkv[0].dtype
    wanted = attention_formula(*(t.double() for t in qkv), **converted(arguments, torch.double))
    same = attention_formula(*qkv, **converted(arguments, dtype))
    with fastformer.strict():
        ours = F.attention(*qkv, **converted(arguments, dtype))
    assert ours.transpose(1, 2).is_contiguous()
    # Single rows, some of which cancel to next to nothing: a mean of values has their size.
    assert_close_to_fp64("out", ours, same, wanted, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignored", PADDING)
def test_padding(ignored, shape, dtype):
    mask = PADDING[ignored](SHAPES[shape][1])
    for kv_heads in (HKV, HQ):
        qkv = inputs(SHAPES[shape], dtype, kv_heads)
        check(qkv, {"key_padding_mask": mask})
        check(qkv, {"key_padding_mask": mask, "causal": True, "scale": -0.4})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", FEATURE_CASES)
def test_everything_else_that_is_added(case, shape, dtype):
    sq, sk, _, _ = SHAPES[shape]
    for kv_heads in (HKV, HQ):
        qkv = inputs(SHAPES[shape], dtype, kv_heads)
        arguments = FEATURE_CASES[case](sq, sk)
        check(qkv, arguments)
        check(qkv, {"key_padding_mask": some(B, sk, share=0.3), **arguments})


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_instruction_set(kernels, monkeypatch):
    name, isa = kernels.split()
    module = importlib.import_module(f"fastformer.{name}")
    before = module.cpu_isa()
    try:
        module.set_cpu_isa(isa)
    except NotImplementedError:
        pytest.skip(f"this CPU cannot run {isa}")
    monkeypatch.setattr(cpu, "_C", module)
    try:
        for dtype in DTYPES:
            for ignored in PADDING.values():
                check(inputs((1, 131, 40, 24), dtype), {"key_padding_mask": ignored(131)})
            for arguments in (FEATURE_CASES["all at once"](2, 150), FEATURE_CASES["T5's decoder bias"](2, 150)):
                check(inputs((2, 150, 17, 33), dtype), arguments)
    finally:
        module.set_cpu_isa(before)


@pytest.mark.parametrize("seed", range(20))
def test_any_combination(seed):
    """Beside the way by tiles, which a call that asks for the log-sum-exp takes."""
    rng = random.Random(1000 + seed)
    dtype = rng.choice(DTYPES[:3])
    few = 0
    while few < 5:
        (q, k, v, *_), options, _ = random_call(rng, dtype)
        if options.cu_seqlens_q is not None or options.dropout_p > 0:
            continue
        q, few = q[:, :, : rng.choice([1, 2, 4])], few + 1
        cut = {n: t for n in ("mask", "bias") if (t := getattr(options, n)) is not None}
        options = options._replace(**{n: t[:, :, : q.shape[2]] for n, t in cut.items()})
        wanted, _ = reference.forward(q.double(), k.double(), v.double(), in_double(options))
        same, _ = reference.forward(q, k, v, options)
        ours, tiles = cpu.forward_only(q, k, v, options), cpu.forward(q, k, v, options)[0]
        if ours.numel():
            assert_close_to_fp64("out", ours, same, wanted, scale=4.0)
            assert_close_to_fp64("tiles", tiles, same, wanted, scale=4.0)


def test_keys_and_values_are_not_copied():
    from fastformer import _C

    def workspace(sq: int, lse: Tensor | None, kv_heads: int = 8, **fields) -> int:
        q, k = torch.empty(2, 8, sq, 64), torch.empty(2, kv_heads, 5000, 64)
        options = Options(1.0, key_padding_mask=torch.zeros(2, 5000, dtype=torch.bool), **fields)
        return _C.attention_workspace((q, k, k, q, lse), options, (q, None, q, k, k, None, None))[0]

    one_head = 2 * 5000 * 64 * 4
    assert workspace(1, None) < one_head < workspace(1, torch.empty(2, 8, 1))
    assert workspace(4, None, bias=torch.empty(1, 1, 4, 5000)) < one_head < workspace(100, None)
    assert workspace(1, None, kv_heads=2) < one_head < workspace(2, None, kv_heads=1)


def test_what_is_ignored_is_not_read_where_whole_blocks_are():
    q, k, v = inputs((1, 700, 16, 16), torch.float32)
    ignored = padding((300, 700), keys=700).expand(B, -1)
    k[:, :, 300:], v[:, :, 300:] = float("nan"), float("nan")
    out = F.attention(q, k, v, key_padding_mask=ignored)
    assert torch.equal(out, F.attention(q, k[:, :, :300], v[:, :, :300]))


def test_a_sequence_gives_the_same_bits_in_any_batch_and_at_any_number_of_threads():
    q, k, v = (t.repeat(4, 1, 1, 1) for t in inputs((1, 900, 32, 32), torch.float32))
    ignored = some(8, 900, share=0.5)
    table = normal(32, HQ)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(F.attention(q, k, v, key_padding_mask=ignored, relative_bias=(table, True, 32, 128)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = F.attention(q[5:6], k[5:6], v[5:6], key_padding_mask=ignored[5:6], relative_bias=(table, True, 32, 128))
    assert torch.equal(alone, results[0][5:6])


def test_gradients_are_those_of_the_sums_they_recompute():
    """With a gradient wanted the scores are summed as backward sums them: the weight of a single key is 1 exactly."""
    q, k, v = (t.requires_grad_() for t in inputs((1, 300, 40, 24), torch.float32))
    with torch.no_grad():
        k[:, :, 7] *= 1000
    ignored = padding((0, 7), (8, 300), keys=300).expand(B, -1)
    F.attention(q, k, v, key_padding_mask=ignored, scale=1.0).sum().backward()
    assert torch.equal(v.grad[:, :, 7], torch.full_like(v.grad[:, :, 7], HQ / HKV))
