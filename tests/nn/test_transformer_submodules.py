"""Submodules with hooks, and replaced ones, are called; whole layers likewise. Everything beside torch.nn's layers."""

import copy

import pytest
import torch

from fastformer import nn

E, H, HIDDEN = 16, 4, 24
N, S = 2, 5

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")

LAYERS = {"encoder": "TransformerEncoderLayer", "decoder": "TransformerDecoderLayer"}
CASES = [(kind, norm_first) for kind in LAYERS for norm_first in (False, True)]


def pair(kind, norm_first=False, dropout=0.0):
    made = []
    for package in (nn, torch.nn):
        torch.manual_seed(0)
        made.append(
            getattr(package, LAYERS[kind])(
                E, H, HIDDEN, dropout, norm_first=norm_first, batch_first=True, activation=package.GELU()
            )
        )
    return made


def inputs(kind):
    return [torch.randn(N, S, E)] * (1 if kind == "encoder" else 2)


def assert_same(ours, theirs, *arguments):
    """Outputs and gradients of a layer."""
    results = []
    for module in (ours, theirs):
        module.zero_grad()
        leaves = [x.clone().requires_grad_() for x in arguments]
        out = module(*leaves)
        out.sin().sum().backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([out.detach(), *(x.grad for x in leaves), *gradients])
    for mine, peer in zip(*results, strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "norm_first"), CASES)
def test_hooks_see_what_they_see_in_torch(kind, norm_first):
    modules, arguments = pair(kind, norm_first), inputs(kind)
    seen = []
    for module in modules:
        calls = []
        for name, part in module.named_modules():
            if "out_proj" in name:
                continue  # read by torch's attention as by ours

            def hook(part, inputs, out, name=name, calls=calls):
                first = out[0] if isinstance(out, tuple) else out
                calls.append((name, inputs[0].detach(), first.detach()))

            part.register_forward_hook(hook)
        module(*arguments)
        seen.append(calls)
    assert [c[0] for c in seen[0]] == [c[0] for c in seen[1]] and len(seen[0]) >= 8
    for (name, *mine), (_, *peers) in zip(*seen, strict=True):
        for a, b in zip(mine, peers, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


PARTS = ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2", "activation"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("kind", "norm_first"), CASES)
def test_each_hook_may_change_what_passes(kind, norm_first, part):
    def double(module, inputs, out):
        return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

    def halve(module, inputs):
        return tuple(x / 2 for x in inputs)

    modules = pair(kind, norm_first)
    for module in modules:
        module.get_submodule(part).register_forward_hook(double)
    assert_same(*modules, *inputs(kind))
    if part != "self_attn":  # which has other inputs than the stream
        modules = pair(kind, norm_first)
        for module in modules:
            module.get_submodule(part).register_forward_pre_hook(halve)
        assert_same(*modules, *inputs(kind))


class LowRank(torch.nn.Module):
    """An adapter: a frozen layer, and a product of two thin matrices beside it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


REPLACEMENTS = {
    "linear1": LowRank,
    "linear2": LowRank,
    "norm1": lambda norm: torch.nn.RMSNorm(E),
    "norm2": lambda norm: torch.nn.Identity(),
    "dropout1": lambda dropout: torch.nn.Identity(),
    "activation": lambda activation: torch.nn.Tanh(),
    "self_attn": lambda attention: torch.nn.MultiheadAttention(E, H, batch_first=True),
    "self_attn.out_proj": LowRank,  # torch reads its weight and bias
    "self_attn.out_proj.weight": lambda weight: torch.nn.Parameter(weight * 2),
}


@pytest.mark.parametrize("part", REPLACEMENTS)
@pytest.mark.parametrize(("kind", "norm_first"), CASES)
def test_replaced_parts(kind, norm_first, part):
    modules = pair(kind, norm_first)
    *path, name = part.split(".")
    for module in modules:
        torch.manual_seed(1)
        owner = module.get_submodule(".".join(path))
        setattr(owner, name, REPLACEMENTS[part](getattr(owner, name)))
    assert_same(*modules, *inputs(kind))


def test_parametrised_and_replaced_methods():
    for change in (
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.linear1),
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.self_attn.out_proj),
        lambda layer: setattr(layer.linear2, "forward", lambda x, w=layer.linear2.weight: x @ w.t() + 1),
        lambda layer: setattr(layer, "_ff_block", lambda x: x * 2),
        lambda layer: setattr(layer, "_sa_block", lambda x, *masks, **options: x * 2),
    ):
        for kind, norm_first in CASES:
            modules = pair(kind, norm_first)
            for module in modules:
                change(module)
            assert_same(*modules, *inputs(kind))


def test_subclasses_that_change_a_block():
    def changed(package):
        class Layer(package.TransformerEncoderLayer):
            def _sa_block(self, x, *masks, **options):
                return super()._sa_block(x, *masks, **options) * 2

        torch.manual_seed(0)
        return Layer(E, H, HIDDEN, 0.0, batch_first=True)

    assert_same(changed(nn), changed(torch.nn), *inputs("encoder"))
    encoders = [p.TransformerEncoder(changed(p), 2) for p in (nn, torch.nn)]
    assert_same(*encoders, *inputs("encoder"))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_hooked_layer_of_a_stack_sees_the_stream(kind, norm_first):
    modules, seen = [], []
    for package, layer in zip((nn, torch.nn), pair(kind, norm_first), strict=True):
        stack = getattr(package, LAYERS[kind].removesuffix("Layer"))(layer, 3, package.LayerNorm(E))
        stack.layers[1].register_forward_hook(lambda layer, inputs, out: seen.append((inputs[0], out)))
        stack.norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0] * 2,))
        modules.append(stack)
    assert_same(*modules, *inputs(kind))
    for mine, peer in zip(*seen, strict=True):
        torch.testing.assert_close(mine, peer)


def test_global_hooks_fire():
    modules = pair("encoder")
    counts = []
    for module in modules:
        calls = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o, calls=calls: calls.append(m))
        try:
            module(*inputs("encoder"))
        finally:
            handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] == 10  # the layer and its nine parts


def test_backward_hooks_fire():
    ours, theirs = pair("encoder")
    seen = []
    for module in (ours, theirs):
        module.linear1.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0]))
        module(inputs("encoder")[0]).sin().sum().backward()
    assert len(seen) == 2


def test_copies_keep_replaced_parts():
    layer = nn.TransformerEncoderLayer(E, H, HIDDEN, 0.0, batch_first=True)
    layer.linear1 = LowRank(layer.linear1)
    twin = copy.deepcopy(layer)
    x = torch.randn(N, S, E)
    torch.testing.assert_close(twin(x), layer(x))
    with torch.no_grad():
        twin.linear1.up += 1
    assert not torch.allclose(twin(x), layer(x))
