"""PyTorch's own sample inputs of its modules (its ``module_db``) through the modules that replace them."""

from __future__ import annotations

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import compare

pytest.importorskip("expecttest", reason="torch's module_db imports expecttest (pip install expecttest)")

MODULES = [
    "CrossEntropyLoss",
    "Embedding",
    "GELU",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "RMSNorm",
    "ReLU",
    "SiLU",
    "Softmax",
]
PARAMETERS = {"Embedding", "LayerNorm", "RMSNorm"}  # made in the dtype of the input; the losses' samples say it


@pytest.fixture(scope="module")
def module_db():
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls: info for info in module_db}


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MODULES)
def test_samples(name, dtype, module_db):
    theirs = getattr(torch.nn, name, None)
    if theirs not in module_db:
        pytest.skip(f"torch {torch.__version__} has no samples of {name}")
    info, tried = module_db[theirs], 0
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
        made, call = sample.constructor_input, sample.forward_input
        if dtype != torch.float32 and made.kwargs.get("options") is not None:
            continue  # the size of torch's chunks, two thirds of all samples: once is enough
        kwargs = {**made.kwargs, "dtype": dtype} if name in PARAMETERS else made.kwargs
        pair = [cls(*made.args, **kwargs) for cls in (getattr(nn, name), theirs)]
        # times 1: what works in place may not change a leaf
        compare(
            *pair, list(call.args), lambda module, *inputs, call=call: module(inputs[0] * 1, *inputs[1:], **call.kwargs)
        )
        tried += 1
    assert tried >= 2
