"""README.md, CONTRIBUTING.md and docs/: the code runs, the commands exist, the excerpts are in the files they name.

```python            runs in an empty folder, alone
```<language> in:X   each of its lines stands in the file X
```bash              make targets, fastformer verbs and flags, and files that exist
"""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from fastformer.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(accept):
    """Parameters (code, info) of the blocks whose info string ``accept`` takes, named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if accept(match[1]):
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], match[1], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("code, info", blocks(lambda info: info == "python"))
def test_python_runs(code, info, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code, info", blocks(lambda info: " in:" in info))
def test_excerpt_is_in_its_file(code, info):
    path = ROOT / info.split(" in:")[1].strip()
    lines = set(path.read_text(encoding="utf-8").splitlines())
    missing = [line for line in code.splitlines() if line.strip() and line not in lines]
    assert not missing, f"{path} has no such lines"


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def help_text(verb: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return text.getvalue()


def check_command(words):
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value before the command
        words = words[1:]
    program, *rest = words
    if program == "make":
        for target in rest:
            assert "=" in target or target in make_targets(), f"make has no target {target}"
    elif program == "fastformer":
        verb = rest[0]
        assert verb in VERBS, f"fastformer has no verb {verb}"
        for flag in (word for word in rest[1:] if word.startswith("--")):
            assert flag in help_text(verb), f"fastformer {verb} has no flag {flag}"
    elif program == "torchrun":
        check_command(rest[rest.index("-m") + 1 :])
    elif program in ("python", "bash"):
        if rest[0] == "-m":
            assert rest[1] in ("pytest", "benchmarks", "fastformer") or rest[1].startswith("fastformer."), rest[1]
        else:
            assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
    elif program == "cmake":
        assert (ROOT / "csrc" / "CMakeLists.txt").is_file()
    elif program == "pip":
        assert rest[0] == "install"
    else:
        raise AssertionError(f"this test does not know the command {program!r}; teach it what to check")


@pytest.mark.parametrize("code, info", blocks(lambda info: info in ("bash", "sh", "console")))
def test_commands_exist(code, info):
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Relative links lead somewhere."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
