"""fastformer.optimize on torch.nn and on models of one's own: numbers, identity of everything, undoing, checking."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastformer
from fastformer.backends import matmul
from fastformer.integrations.optimize import Rule, optimize, rules
from tests.nn.comparison import assert_as_accurate


class Model(nn.Module):
    """What people write: a module used twice, two tied weights, a module in a list on the side."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(31, 24, padding_idx=0)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.rms = nn.RMSNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.GELU("tanh"), nn.Dropout(0.0), nn.Linear(40, 24), nn.SiLU())
        self.act = nn.ReLU()
        self.head = nn.Linear(24, 31, bias=False)
        self.head.weight = self.tokens.weight
        self.softmax = nn.Softmax(-1)
        self.on_the_side = [self.norm]

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.on_the_side[0](x + self.mlp(self.rms(x)))
        return self.softmax(self.head(self.act(x)))


def stack(norm_first=False, layers=2):
    layer = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


MODELS = {
    "own": (Model, lambda: (torch.arange(14).reshape(2, 7),)),
    "encoder": (stack, lambda: (torch.randn(2, 7, 24),)),
    "encoder, pre-norm": (lambda: stack(True), lambda: (torch.randn(2, 7, 24),)),
    "transformer": (
        lambda: nn.Transformer(24, 2, 1, 1, 40, 0.0, batch_first=True),
        lambda: (torch.randn(2, 7, 24), torch.randn(2, 5, 24)),
    ),
    "classifier": (
        lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 9), nn.LogSoftmax(-1)),
        lambda: (torch.randn(5, 24),),
    ),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(name):
    torch.manual_seed(1)
    return MODELS[name][1]()


def run(model, batch):
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    leaves = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in batch]
    out = model(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    found = {"output": out.detach()}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name):
    exact, theirs = make(name).double(), make(name)
    ours, double = copy.deepcopy(theirs), copy.deepcopy(exact)
    assert optimize(ours).swapped and optimize(double).swapped
    wanted, peers, mine = (run(model, batch_of(name)) for model in (exact, theirs, ours))
    assert mine.keys() == peers.keys() == wanted.keys()
    for key in wanted:
        assert_as_accurate(key, mine[key], peers[key], wanted[key])
    for key, value in run(double, batch_of(name)).items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def masks_of(name):
    """Arguments beside the inputs: causality, padding, and a bias of numbers."""
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    if name == "transformer":
        target = nn.Transformer.generate_square_subsequent_mask(5)
        return {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": target}
    return {"src_key_padding_mask": padding, "mask": causal, "is_causal": True}


@pytest.mark.parametrize("name", ["encoder", "encoder, pre-norm", "transformer"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors")  # torch's own
def test_masks(name, training):
    """Real positions agree; what torch computes at padding is left open (zeros for inference, anything else before)."""
    theirs = make(name).train(training)
    ours = copy.deepcopy(theirs)
    optimize(ours)
    batch, masks = batch_of(name), masks_of(name)
    real = slice(None) if name == "transformer" else ~masks["src_key_padding_mask"]
    results = []
    for model in (theirs, ours):
        out = model(*batch, **masks)[real]
        model.zero_grad()
        out.square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(ours(*batch, **masks)[real], theirs(*batch, **masks)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_copies_stay_optimized(name):
    model = make(name)
    optimize(model)
    wanted = run(model, batch_of(name))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(value, wanted[key]) for key, value in run(twin, batch_of(name)).items())


def test_losses():
    for loss, out in ((nn.CrossEntropyLoss(label_smoothing=0.1), 9), (getattr(nn, "LinearCrossEntropyLoss", None), 9)):
        if loss is None:
            continue
        loss = loss if isinstance(loss, nn.Module) else loss(24, out)
        x, target = torch.randn(5, 9 if type(loss) is nn.CrossEntropyLoss else 24), torch.tensor([0, 1, 2, 8, -100])
        wanted = loss(x, target)
        optimize(loss)
        assert isinstance(loss, getattr(fastformer.nn, type(loss).__name__))
        torch.testing.assert_close(loss(x, target), wanted)
        torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(x, target), wanted)


def test_everything_but_the_class_stays():
    model = make("own").train()
    modules, parameters = list(model.modules()), list(model.parameters())
    state = [(name, value.data_ptr()) for name, value in model.state_dict().items()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fired = []
    model.norm.register_forward_hook(lambda *_: fired.append("hook"))
    report = fastformer.optimize(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [(name, value.data_ptr()) for name, value in model.state_dict().items()] == state
    assert type(model.norm) is fastformer.nn.LayerNorm and model.on_the_side[0] is model.norm
    assert model.head.weight is model.tokens.weight
    assert all(module.training for module in model.modules())
    before = model.tokens.weight.clone()
    model(*batch_of("own"))[..., 0].sum().backward()
    optimizer.step()
    assert not torch.equal(model.tokens.weight, before)
    assert fired == ["hook"] * 2  # it is called twice
    assert {swapped.name for swapped in report.swapped} >= {"tokens", "attention", "norm", "rms", "mlp", "softmax"}


def test_undo_and_restore():
    model = make("own")
    before = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    wanted = run(model, batch_of("own"))
    report = optimize(model)
    report.undo()
    after = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    assert after == before
    assert all(torch.equal(value, wanted[key]) for key, value in run(model, batch_of("own")).items())
    optimize(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        fastformer.restore(twin)
        assert {name: (type(m), sorted(m.__dict__)) for name, m in twin.named_modules()} == before
    report.undo()  # nothing left to undo
    assert type(model.norm) is nn.LayerNorm


def test_a_module_changed_since_is_not_restored():
    model = nn.Sequential(nn.LayerNorm(8))
    optimize(model)

    class Other(fastformer.nn.LayerNorm):
        pass

    model[0].__class__ = Other
    with pytest.warns(UserWarning, match="Other was changed by something else since"):
        fastformer.restore(model)
    assert type(model[0]) is Other


def test_idempotent_and_of_a_part():
    model = make("own")
    first = optimize(model.mlp)
    assert type(model.norm) is nn.LayerNorm
    second = optimize(model)
    assert second.already == len(first.swapped) and not {"mlp", "mlp.1"} & {swapped.name for swapped in second.swapped}
    second.undo()
    assert type(model.norm) is nn.LayerNorm and type(model.mlp) is not nn.Sequential
    optimize(model)
    assert not optimize(model).swapped


def test_the_report_reads_well(capsys, monkeypatch):
    monkeypatch.setattr(matmul, "CONVERTED", frozenset())
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8))
    report = optimize(model)
    assert capsys.readouterr().out == f"{report}\n"
    optimize(model, verbose=False)
    assert capsys.readouterr().out == ""
    assert str(report).splitlines() == [
        "fastformer.optimize: Sequential, 2 swapped, 3 left",
        "  swapped",
        "       2 LayerNorm: layer_norm (0 and 1 more)",
        "  left",
        "       2 Linear: its matmul is the vendor library's either way (1 and 1 more)",
        "       1 Tanh: no fused kernel for it (2)",
    ]


# ---- what is left ----------------------------------------------------------------------------------------------------


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class OwnConstructor(nn.LayerNorm):
    def __init__(self):
        super().__init__(8, eps=1e-3)


def reason(module):
    report = optimize(nn.ModuleList([module]))
    assert not report.swapped
    return next(left.reason for left in report.left if left.name == "0")


def test_a_subclass_is_proved_by_its_methods():
    assert reason(OwnForward(8)) == "a subclass of torch's LayerNorm with methods of its own"
    model, x = nn.Sequential(OwnConstructor()), torch.randn(3, 8)
    wanted = model(x)
    assert [swapped.type for swapped in optimize(model).swapped] == ["OwnConstructor"]
    assert isinstance(model[0], OwnConstructor) and isinstance(model[0], fastformer.nn.LayerNorm)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_reasons(monkeypatch):
    monkeypatch.setattr(matmul, "CONVERTED", frozenset())
    replaced = nn.LayerNorm(8)
    replaced.forward = lambda x: x
    assert reason(replaced) == "its forward was replaced"
    parametrised = torch.nn.utils.parametrize.register_parametrization(nn.LayerNorm(8), "weight", nn.Identity())
    assert reason(parametrised) == "it is parametrised"
    assert reason(nn.Embedding(8, 8, max_norm=1.0)) == "max_norm has no fused kernel"
    assert reason(nn.MultiheadAttention(1024, 2)) == "head_dim 512 is over 256"
    assert reason(nn.LayerNorm(8, dtype=torch.complex64)) == "its parameters are torch.complex64"
    assert reason(torch.jit.script(nn.LayerNorm(8))) == "compiled by torch.jit"
    assert reason(torch.compile(nn.LayerNorm(8))).startswith("compiled: call optimize before")
    assert reason(fastformer.nn.LayerNorm(8)) == "fastformer's own"
    compiled = nn.LayerNorm(8)
    compiled.compile()
    assert reason(compiled).startswith("compiled")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        optimize("gpt2")


def test_sequential_calls_what_it_may_not_read():
    """With a hook or a replaced layer in the block its modules are called one by one."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))
    x = torch.randn(3, 8)
    wanted = model(x)
    optimize(model)
    torch.testing.assert_close(model(x), wanted)
    fired = []
    handle = model[1].register_forward_hook(lambda m, i, out: fired.append(out.shape))
    torch.testing.assert_close(model(x), wanted)
    assert fired == [(3, 16)]
    handle.remove()
    model[0] = nn.Identity()
    torch.testing.assert_close(model(torch.randn(3, 16)).shape, torch.Size([3, 8]))
    assert [type(m) for m in model[:2]] == [nn.Identity, fastformer.nn.GELU] and len(model) == 4
    model.append(nn.Tanh())
    assert list(model.state_dict()) == ["3.weight", "3.bias"]


def test_sequential_drops_while_training():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 8))
    optimize(model)
    x = torch.randn(3, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_half_precision_on_a_cpu_swaps_linear_layers():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    assert [swapped.type for swapped in optimize(model).swapped] == ["Linear"]
    assert type(model[0]) is fastformer.nn.Linear
    meta = nn.Sequential(nn.LayerNorm(8, device="meta"))
    assert [swapped.type for swapped in optimize(meta).swapped] == ["LayerNorm"]


@pytest.mark.parametrize("converted", [True, False])
def test_float32_linear_layers_where_autocast_is_slow(converted, monkeypatch):
    monkeypatch.setattr(matmul, "CONVERTED", frozenset({torch.bfloat16, torch.float16} if converted else ()))
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 7, bias=False), nn.Linear(7, 7).double())
    x, batch = torch.randn(9, 512), torch.randn(2, 512)
    front = model[:3]
    wanted = front(x)
    report = optimize(model, verbose=False)
    assert [s.type for s in report.swapped] == ["Linear"] * 2 * converted
    assert [type(m) is fastformer.nn.Linear for m in model] == [converted, False, converted, False], "float64 is left"
    assert torch.equal(front(x), wanted), "float32 is torch's either way"
    seen = []
    product = matmul.addmm
    monkeypatch.setattr(matmul, "addmm", lambda *a, **k: seen.append(1) or product(*a, **k))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert front(x).dtype == front(batch).dtype == torch.bfloat16
        ours = torch.autograd.grad(front(x).float().square().sum(), list(front.parameters()))
    assert bool(seen) == converted
    report.undo()
    assert all(type(m) is nn.Linear for m in (model[0], model[2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torch.autograd.grad(front(x).float().square().sum(), list(front.parameters()))
    exact = copy.deepcopy(front).double()
    exact = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))
    for mine, same, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        assert_as_accurate("gradient", mine, same, right)


def test_compiles_without_a_break():
    model = make("own").eval()
    optimize(model)
    batch = batch_of("own")
    wanted = model(*batch)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*batch), wanted)


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_before_and_after(one_process):
    from torch.nn.parallel import DistributedDataParallel

    wanted = run(make("own"), batch_of("own"))
    before = DistributedDataParallel(make("own"))
    assert optimize(before).swapped
    after = make("own")
    optimize(after)
    for model in (before, DistributedDataParallel(after)):
        found = run(model, batch_of("own"))
        torch.testing.assert_close(found["output"], wanted["output"])
        gradient = found["gradient of module.norm.weight"]
        torch.testing.assert_close(gradient, wanted["gradient of norm.weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch.nn.Linear itself returns a view
def test_fsdp_after(one_process):
    """Sharded parameters are whole while their module runs; what is sharded already is left."""
    from torch.distributed.fsdp import fully_shard

    wanted = run(make("own"), batch_of("own"))
    model = make("own")
    optimize(model)
    for module in (model.mlp[0], model.mlp, model):
        fully_shard(module)
    found = run(model, batch_of("own"))
    torch.testing.assert_close(found["output"], wanted["output"])
    for name in ("mlp.0.weight", "mlp.3.bias"):
        gradient = found[f"gradient of {name}"].full_tensor()
        torch.testing.assert_close(gradient, wanted[f"gradient of {name}"], rtol=1e-4, atol=1e-6)
    sharded = make("classifier")
    fully_shard(sharded)
    assert [left.reason for left in optimize(sharded).left] == ["sharded by FSDP: call optimize before"]


# ---- rules of one's own and the check --------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


class FastScale(Scale):
    def forward(self, x):
        return self.weight * x


class WrongScale(Scale):
    def forward(self, x):
        return x * self.weight * 1.01


class FailingScale(Scale):
    def forward(self, x):
        raise RuntimeError("no such kernel")


def test_rules_are_open(monkeypatch):
    model = nn.Sequential(Scale(), nn.LayerNorm(8))
    assert [left.reason for left in optimize(model).left] == ["no fused kernel for it"]
    fastformer.restore(model)
    monkeypatch.setitem(rules, Scale, Rule(FastScale, "scale"))
    report = optimize(model, check=torch.randn(3, 8))
    assert type(model[0]) is FastScale and report.swapped[0].operations == "scale"
    monkeypatch.setitem(rules, Scale, Rule(nn.Tanh, "scale"))
    with pytest.raises(TypeError, match="rules: Tanh is no subclass of Scale"):
        optimize(nn.Sequential(Scale()))


@pytest.mark.parametrize("wrong, message", [(WrongScale, "off by"), (FailingScale, "RuntimeError: no such kernel")])
def test_check_catches_a_wrong_swap_and_undoes_everything(monkeypatch, wrong, message):
    monkeypatch.setitem(rules, Scale, Rule(wrong, "scale"))
    model = nn.Sequential(nn.LayerNorm(8), Scale(), nn.Dropout(0.5), nn.GELU()).train()
    model[2].eval()
    x = torch.randn(3, 8)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"check: Scale differs: .*{message}.*nothing was changed"):
        optimize(model, check=x)
    assert [type(m) for m in model.modules()] == before
    assert [m.training for m in model] == [True, True, False, True]
    assert not any("_optimized_from" in m.__dict__ for m in model.modules())
    if wrong is WrongScale:
        optimize(model, check=x, tolerance=0.1)
        assert type(model[1]) is WrongScale


class Outputs(nn.Module):
    """Nested outputs of every kind; only the innermost differs."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, x, *, flag=True):
        cache = type("Cache", (), {})()
        cache.layers = [(x, self.scale(x))]
        return {"logits": x, "cache": cache, "ids": x.argmax(-1), "none": None, "flag": flag}


def test_check_sees_every_tensor(monkeypatch):
    monkeypatch.setitem(rules, Scale, Rule(WrongScale, "scale"))
    for batch in (torch.randn(3, 8), [torch.randn(3, 8)], {"x": torch.randn(3, 8), "flag": False}):
        with pytest.raises(ValueError, match=r"check: Scale differs: output\.cache\.layers\[0\]\[1\]: off by"):
            optimize(Outputs(), check=batch)


def test_check_does_not_draw_random_numbers():
    model, batch = make("encoder"), batch_of("encoder")
    state = torch.get_rng_state()
    assert optimize(model, check=batch).swapped
    assert torch.equal(torch.get_rng_state(), state)
