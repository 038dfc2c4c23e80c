"""``import fastformer`` beside torch: quick, and nothing heavy comes along."""

import subprocess
import sys

import pytest

# Each takes from a tenth of a second to several; what needs one imports it when it runs. torch itself imports numpy.
HEAVY = (
    *("transformers", "tokenizers", "huggingface_hub", "safetensors", "triton", "scipy", "matplotlib", "tensorboard"),
    *("torch._dynamo", "torch._inductor", "torch.testing", "torch.distributed.fsdp", "sympy", "pandas", "rich", "tyro"),
)
LIMIT = 0.3  # seconds beyond torch's


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_is_imported():
    code = "import sys, torch; before = set(sys.modules); import fastformer.nn, fastformer.models"
    imported = python(f"{code}; print(*set(sys.modules) - before)").split()
    assert {"fastformer", "fastformer.nn", "fastformer.models"} <= set(imported)
    assert not [m for m in imported if any(m == heavy or m.startswith(f"{heavy}.") for heavy in HEAVY)]


def test_import_takes_less_than_its_limit_beyond_torch():
    """Its own processor time, the least of a few processes: what else the machine does is not counted."""
    code = "import time, torch; start = time.process_time(); import fastformer; print(time.process_time() - start)"
    times = []
    for _ in range(5):
        times.append(float(python(code)))
        if times[-1] < LIMIT:
            return
    pytest.fail(f"{min(times):.2f} s at the least, of {times}")
