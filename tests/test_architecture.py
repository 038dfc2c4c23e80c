"""Rules of the house that a tool can check and ruff and import-linter do not."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fastformer
import fastformer.functional
import fastformer.nn
from fastformer.backends import registry

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "fastformer").rglob("*.py"))
CSRC = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cuh", ".cpp", ".cu")]


def imported(path):
    """Last parts of every module or name that the file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[-1] for alias in node.names if alias.name.startswith("fastformer"))
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fastformer")):
            yield from (alias.name for alias in node.names)


def test_only_backends_know_the_extension_modules():
    allowed = {ROOT / "fastformer" / "doctor.py"}
    found = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if "backends" not in path.parts and path not in allowed and {"_C", "_cuda", "_C_wide"} & set(imported(path))
    ]
    assert not found


def test_no_torch_headers():
    """One build serves every torch version."""
    torch_include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    assert not [str(p) for p in CSRC if torch_include.search(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_backend_files_share_the_reference_signatures(backend):
    """`forward` and `backward` take the reference's parameters, by name and in order."""
    folder = ROOT / "fastformer" / "backends"

    def parameters(path):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        arguments = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
        return {
            name: [a.arg for a in (*arguments[name].posonlyargs, *arguments[name].args)]
            for name in ("forward", "backward")
            if name in arguments  # decode_attention has no derivative
        }

    for op in registry.OPS:
        path = folder / backend / f"{op}.py"
        if path.exists():
            assert parameters(path) == parameters(folder / "reference" / f"{op}.py"), f"{backend}/{op}.py"


def public_functions():
    functions = {f"functional.{name}": getattr(fastformer.functional, name) for name in fastformer.functional.__all__}
    functions = {name: f for name, f in functions.items() if not isinstance(f, type)}
    functions |= {f"nn.{name}.forward": getattr(fastformer.nn, name).forward for name in fastformer.nn.__all__}
    names = ("backend", "explain", "from_pretrained", "optimize", "restore", "strict")
    functions |= {name: getattr(fastformer, name) for name in names}
    return [pytest.param(function, id=name) for name, function in functions.items()]


@pytest.mark.parametrize("function", public_functions())
def test_public_functions_are_annotated_and_documented(function):
    function = inspect.unwrap(function)
    signature = inspect.signature(function)
    untyped = [
        p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty and p.name != "self"
    ]
    assert not untyped
    assert signature.return_annotation is not inspect.Signature.empty
    assert function.__doc__
