"""Attention and transformer layers under torch.compile, torch.export, autocast and torch.func."""

import pytest
import torch

from fastformer import nn

E, H, HIDDEN = 16, 4, 24
N, L, S = 3, 5, 7

CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.arange(L) >= torch.tensor([3, 1, 5])[:, None]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()  # all cases have the code of one class, and a compiler keeps few versions of it


class Call(torch.nn.Module):
    """A module with the masks of its call; takes x (N, L, E) and the memory (N, S, E)."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x, memory):
        return self.call(self.module, x, memory)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(E, H, HIDDEN, 0.0, batch_first=True, **options)


CASES = {
    "cross-attention": lambda: Call(
        nn.MultiheadAttention(E, H, batch_first=True), lambda m, x, y: m(x, y, y, need_weights=False)[0]
    ),
    "attention with weights": lambda: Call(
        nn.MultiheadAttention(E, H, batch_first=True), lambda m, x, y: m(x, x, x, key_padding_mask=PADDING)[0]
    ),
    "encoder layer": lambda: Call(encoder_layer(), lambda m, x, y: m(x, src_key_padding_mask=PADDING)),
    "encoder layer, pre-norm": lambda: Call(
        encoder_layer(norm_first=True, activation=torch.nn.GELU()), lambda m, x, y: m(x, CAUSAL, is_causal=True)
    ),
    "decoder layer": lambda: Call(
        nn.TransformerDecoderLayer(E, H, HIDDEN, 0.0, batch_first=True), lambda m, x, y: m(x, y, CAUSAL)
    ),
    "encoder": lambda: Call(
        nn.TransformerEncoder(encoder_layer(norm_first=True), 2, nn.LayerNorm(E)), lambda m, x, y: m(x, CAUSAL)
    ),
    "encoder, padded": lambda: Call(
        nn.TransformerEncoder(encoder_layer(), 2, mask_check=False), lambda m, x, y: m(x, None, PADDING)
    ),
}

cases = pytest.mark.parametrize("name", CASES)


def inputs(*batch):
    return torch.randn(*batch, N, L, E), torch.randn(*batch, N, S, E)


# Compiling takes seconds, so not all of them.
@pytest.mark.parametrize("name", ["cross-attention", "encoder layer", "decoder layer", "encoder"])
def test_compile(name):
    module = CASES[name]()
    x, y = inputs()
    wanted = module(x, y)
    wanted.sin().sum().backward()
    gradients = [p.grad for p in module.parameters()]
    module.zero_grad()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(x, y)
    torch.testing.assert_close(out, wanted)
    out.sin().sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], gradients)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, y), module(x, y))


@pytest.mark.parametrize(
    ("name", "strict"), [("decoder layer", True), ("encoder", True), *((name, False) for name in CASES)]
)
def test_export(name, strict):
    module, arguments = CASES[name]().eval(), inputs()
    exported = torch.export.export(module, arguments, strict=strict)
    other = inputs()
    torch.testing.assert_close(exported.module()(*other), module(*other))


@cases
def test_autocast(name):
    module, arguments = CASES[name](), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*arguments)
    residual = "attention" not in name
    assert out.dtype == (torch.float32 if residual else torch.bfloat16)
    torch.testing.assert_close(out.float(), module(*arguments), rtol=0.05, atol=0.1)
    out.float().sin().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)


@cases
def test_vmap_and_grad(name):
    module, (x, y) = CASES[name](), inputs(2)
    each = torch.stack([module(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(module)(x, y), each)
    parameters = dict(module.named_parameters())

    def loss(parameters, x, y):
        return torch.func.functional_call(module, parameters, (x, y)).sin().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(2):
        found = torch.func.grad(loss)(parameters, x[i], y[i])
        wanted = torch.autograd.grad(loss(parameters, x[i], y[i]), list(parameters.values()))
        for (key, gradient), exact in zip(found.items(), wanted, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
            torch.testing.assert_close(per_example[key][i], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_is_zero_in_a_compiled_encoder_as_in_an_eager_one():
    encoder = nn.TransformerEncoder(encoder_layer(), 2, mask_check=False).eval()
    x = inputs()[0]
    with torch.no_grad():
        eager = encoder(x, None, PADDING)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")(x, None, PADDING)
    torch.testing.assert_close(compiled, eager)
    assert not compiled[PADDING].any() and compiled[~PADDING].all()
