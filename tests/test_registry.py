"""Which backend runs a call: the choice, the override, strictness, the explanation."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import fastformer
from fastformer import functional as F
from fastformer.backends import registry


def test_the_cpu_kernels_are_chosen_for_cpu_tensors():
    for op in registry.OPS:
        assert registry.select(op, "cpu", torch.float32).__name__ == f"fastformer.backends.cpu.{op}"


def test_override_and_its_end():
    x = torch.randn(2, 8)
    with fastformer.backend("reference"):
        assert fastformer.explain("layer_norm", x, (8,)).backend == "reference"
        assert registry.overridden() == "reference"
        with fastformer.backend(None):
            assert fastformer.explain("layer_norm", x, (8,)).backend == "cpu"
    assert registry.overridden() is None


def test_an_override_that_cannot_be_honoured_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with fastformer.backend("cuda"), pytest.raises(fastformer.UnsupportedError, match="backend 'cuda' was asked for"):
        F.layer_norm(torch.randn(2, 8), (8,))
    with pytest.raises(ValueError, match="name: unknown backend 'gpu'; expected one of cuda, triton, cpu, reference"):
        with fastformer.backend("gpu"):
            pass


def test_the_reference_warns_once_and_is_an_error_under_strict(monkeypatch):
    monkeypatch.setitem(registry.PREFERENCE, "cpu", ("cuda", "reference"))
    monkeypatch.setattr(registry, "_cache", {})
    monkeypatch.setattr(registry, "_warned", set())
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match=r"fastformer\.activation: no fused kernel for cpu torch\.float32"):
        F.bias_activation(x, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.bias_activation(x, None)
    with fastformer.strict(), pytest.raises(fastformer.UnsupportedError, match="no fused kernel"):
        F.bias_activation(x, None)


def test_explain_names_every_backend_and_its_reason():
    text = str(fastformer.explain("attention", *[torch.randn(1, 4, 3, 8)] * 3, causal=True))
    assert text.startswith("attention: cpu")
    assert all(name in text for name in registry.BACKENDS)
    with pytest.raises(ValueError, match="op: 'atention' is not one of"):
        fastformer.explain("atention", torch.randn(1))
    with pytest.raises(ValueError, match="needs the call's tensors"):
        fastformer.explain("activation")


@pytest.mark.parametrize("name, expected", [("reference", "reference"), ("nonsense", "FASTFORMER_BACKEND: unknown")])
def test_environment_variable(name, expected):
    code = "import torch, fastformer; print(fastformer.explain('activation', torch.ones(2)).backend)"
    env = {"FASTFORMER_BACKEND": name, "PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr


def test_features_decide():
    assert registry.refusal("cpu", "attention", "cpu", torch.float32, ("bias",)) is None
    assert registry.refusal("cpu", "attention", "cpu", torch.float32, ("bias", "x")) == "does not implement x"
    assert "dtype int8" in registry.refusal("cpu", "activation", "cpu", torch.int8, ())
    assert registry.refusal("reference", "activation", "cpu", torch.float32, ()) is None
