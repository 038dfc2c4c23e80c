"""transformer_embedding as T5, GPT-2 and BERT begin, beside torch's gathers, additions, norm and dropout.

Forward has to read the token rows that are taken and write as many; backward has to read dout (with a norm the token
rows once more) and to write each table's gradient, which for the tokens is larger than everything else. A table of
positions or segments is read once."""

from __future__ import annotations

import torch
import torch.nn.functional as TF

import fastformer.functional as F
from benchmarks.runner import Case, Cost, Problem, clone_of_bytes, compiled, on_backend, timed

OP = "embedding"

# (name, vocabulary, what is added and done)
T5 = ("T5", {"vocabulary": 32128})
GPT2 = ("GPT-2", {"vocabulary": 50257, "positions": 1024})
BERT = ("BERT dropout 0.1", {"vocabulary": 30522, "positions": 512, "types": 2, "norm": True, "dropout_p": 0.1})

CASES = {
    "cpu": [
        Case(shape, dtype, backward, *model, compiled=dtype == "float32")
        for shape, model in (((16, 512, 512), T5), ((8, 1024, 768), GPT2), ((16, 512, 768), BERT))
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
    ],
    "cuda": [
        Case(shape, "bfloat16", backward, *model, compiled=True)
        for shape, model in (
            ((64, 512, 1024), T5),
            ((32, 1024, 1600), GPT2),
            ((128, 512, 1024), BERT),
            ((8, 8192, 4096), ("Llama", {"vocabulary": 128256})),
        )
        for backward in (False, True)
    ],
    "quick": [
        Case((2, 5, 48), "float32", True, "GPT-2", {"vocabulary": 30, "positions": 8}),
        Case((2, 5, 48), "bfloat16", True, "BERT", {"vocabulary": 30, "positions": 8, "types": 2, "norm": True}),
    ],
}


def setup(case: Case, device: str) -> Problem:
    batch, length, cols = case.shape
    options = case.options
    make = lambda *shape: torch.randn(*shape, device=device).to(case.torch_dtype).requires_grad_(case.backward)  # noqa: E731
    tables = [make(options[name], cols) if name in options else None for name in ("vocabulary", "positions", "types")]
    norm = [make(cols), make(cols)] if options.get("norm") else [None, None]
    ids = torch.randint(options["vocabulary"], (batch, length), device=device)
    types = torch.randint(options["types"], (batch, length), device=device) if "types" in options else None
    wrt = tuple(t for t in (*tables, *norm) if t is not None)
    dout = torch.randn(case.shape, device=device).to(case.torch_dtype)
    return Problem(device, (*tables, *norm, ids, types), wrt, (dout,), random=bool(options.get("dropout_p")))


def cost(case: Case) -> Cost:
    batch, length, cols = case.shape
    options, rows = case.options, batch * length
    added = (length if "positions" in options else 0) + options.get("types", 0)
    moved = 2 * rows + added
    if case.backward:
        moved += (2 if options.get("norm") else 1) * rows
        moved += options["vocabulary"] + options.get("positions", 0) + options.get("types", 0)
    return Cost(bytes=moved * cols * case.torch_dtype.itemsize)


def ours(case: Case):
    eps, p = (1e-12 if case.options.get("norm") else None), case.options.get("dropout_p", 0.0)

    def run(tokens, positions, segments, weight, bias, ids, types):
        norm = {"norm_weight": weight, "norm_bias": bias, "norm_eps": eps}
        return F.transformer_embedding(ids, tokens, positions, segments, token_type_ids=types, dropout_p=p, **norm)

    return run


def eager(case: Case):
    p = case.options.get("dropout_p", 0.0)

    def run(tokens, positions, segments, weight, bias, ids, types):
        x = TF.embedding(ids, tokens)
        if segments is not None:
            x = x + TF.embedding(types, segments)
        if positions is not None:
            x = x + TF.embedding(torch.arange(ids.shape[1], device=ids.device), positions)
        if weight is not None:
            x = TF.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)
        return TF.dropout(x, p) if p else x

    return run


PROVIDERS = {
    "ours": timed(ours),
    "eager": timed(eager),
    "compile": compiled(eager),
    "clone": clone_of_bytes(cost),
    "triton": on_backend("triton", OP, ours, "norm", "dropout"),
    "cuda": on_backend("cuda", OP, ours, "norm", "dropout"),
}
