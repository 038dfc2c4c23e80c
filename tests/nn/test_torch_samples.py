"""PyTorch's own sample inputs of its modules (its ``module_db``) through the modules that replace them."""

from __future__ import annotations

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import assert_as_accurate, compare

pytest.importorskip("expecttest", reason="torch's module_db imports expecttest (pip install expecttest)")

MODULES = [
    "CrossEntropyLoss",
    "Embedding",
    "GELU",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "RMSNorm",
    "ReLU",
    "SiLU",
    "Softmax",
]
TRANSFORMERS = [
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
PARAMETERS = {
    "Embedding",
    "LayerNorm",
    "Linear",
    "RMSNorm",
}  # made in the dtype of the input; the losses' samples say it


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
        options = dict(call.kwargs)
        args = list(call.args) or [options.pop("input")]
        # times 1: what works in place may not change a leaf
        compare(*pair, args, lambda module, *inputs, options=options: module(inputs[0] * 1, *inputs[1:], **options))
        tried += 1
    assert tried >= 2


def ours_of(layer):
    """A layer of ours with the constructor's arguments of one of torch's, which torch's sample of an encoder holds."""
    attention, first = layer.self_attn, layer.linear1
    return nn.TransformerEncoderLayer(
        attention.embed_dim,
        attention.num_heads,
        first.out_features,
        layer.dropout.p,
        layer.activation,
        layer.norm1.eps,
        attention.batch_first,
        layer.norm_first,
        first.bias is not None,
        dtype=first.weight.dtype,
    )


def in_one(out):
    """All tensors that a module returns, as one."""
    return out if isinstance(out, torch.Tensor) else torch.cat([x.flatten() for x in out if x is not None])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float64, True), (torch.float64, False), (torch.float32, True)],
    ids=["float64, training", "float64", "float32, training"],
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_samples_of_transformers(name, dtype, training, module_db):
    theirs_cls, ours_cls = getattr(torch.nn, name), getattr(nn, name)
    info = module_db[theirs_cls]
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert len(samples) >= 16
    for sample in samples:
        made, call = sample.constructor_input, sample.forward_input
        kwargs = made.kwargs if name == "TransformerEncoder" else {**made.kwargs, "dtype": dtype}
        theirs = theirs_cls(*made.args, **kwargs)
        ours = ours_cls(*(ours_of(a) if isinstance(a, torch.nn.Module) else a for a in made.args), **kwargs)
        for module in (ours, theirs):
            module.train(training)
        # The samples' rows are four numbers long: a norm of so few multiplies the roundings of what came before.
        compare(
            ours,
            theirs,
            list(call.args),
            lambda module, *x, call=call: in_one(module(*x, **call.kwargs)),
            roundings=64,
        )
        theirs.load_state_dict(ours.state_dict(), strict=True)
        with torch.no_grad():  # in eval mode torch takes other ways then
            inputs = [x.detach() for x in call.args]
            mine, peers = (in_one(module(*inputs, **call.kwargs)) for module in (ours, theirs))
            exact = in_one(theirs.double()(*(x.double() for x in inputs), **call.kwargs))
        assert_as_accurate("output without gradients", mine, peers, exact, roundings=64)
