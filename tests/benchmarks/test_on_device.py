"""On a GPU: every operation on every backend it has, and a whole model against the CPU. The CPU runs the same lines."""

import importlib

import pytest
import torch

from benchmarks import check
from fastformer.backends import registry
from fastformer.models import GPT2Config, GPT2LMHeadModel

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("op", check.OPS)
def test_every_backend_against_float64(op, backend, device):
    kernel, features = check.KERNELS.get(op, (op, ()))
    case = check.TINY[op][0]
    reason = registry.refusal(backend, kernel, device, case.torch_dtype, features)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    for found in check.check_case(importlib.import_module(f"benchmarks.{op}"), op, case, backend, device):
        assert found.ok, found


@pytest.mark.parametrize("op", check.HUGE)
def test_the_last_rows_of_a_huge_tensor_are_compared(op, monkeypatch):
    module = importlib.import_module(f"benchmarks.{op}")
    (right,) = check.check_huge(module, op, "cpu", "cpu", rows=24)
    assert right.ok and right.case == "24x4096"
    ours = module.ours
    monkeypatch.setattr(module, "ours", lambda case: lambda *args: ours(case)(*args) + (len(args[0]) > 8))
    (wrong,) = check.check_huge(module, op, "cpu", "cpu", rows=24)
    assert not wrong.ok


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_model_trains_and_writes_as_in_float64(device):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=40, n_embd=48, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    exact = GPT2LMHeadModel(config).double()
    model = GPT2LMHeadModel(config)
    model.load_state_dict(exact.state_dict())
    model.to(device)
    ids = torch.randint(50, (3, 24))
    wanted, got = exact(ids, labels=ids), model(ids.to(device), labels=ids.to(device))
    wanted.loss.backward()
    got.loss.backward()
    torch.testing.assert_close(got.logits.cpu().double(), wanted.logits, rtol=1e-4, atol=1e-5)
    gradients = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu().double(), gradients[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    texts = [m.eval().generate(ids[:2, :8].to(m.device), max_new_tokens=16, eos_token_id=[]) for m in (exact, model)]
    assert torch.equal(texts[0], texts[1].cpu())
