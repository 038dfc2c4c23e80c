"""Which backend serves which part of an operation: the table the registry chooses by, for people.

    python -m fastformer.backends.coverage attention          prints it
    python -m fastformer.backends.coverage --write            brings the tables in docs/ up to date

In a page of docs/ the table stands between ``<!-- coverage: OP -->`` and ``<!-- end -->``; a test compares them.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from . import registry

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- coverage: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TITLES = {"cpu": "CPU", "triton": "Triton", "cuda": "CUDA", "reference": "PyTorch"}


def table(op: str) -> str:
    """A Markdown table: a column per backend that has the operation, a row per dtype and per optional part.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in registry.OPS:
        raise ValueError(f"op: {op!r} is not one of {', '.join(registry.OPS)}")
    modules = {name: registry.load(name, op) for name in _TITLES}
    columns = {name: module for name, module in modules.items() if module is not None}
    features = sorted({f for m in columns.values() for f in m.FEATURES}, key=_order(op).index)
    lines = [f"| | {' | '.join(_TITLES[name] for name in columns)} |", f"|---|{'---|' * len(columns)}"]
    for dtype in _DTYPES:
        cells = ["yes" if dtype in m.DTYPES else "–" for m in columns.values()]
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")
    for feature in features:
        cells = ["yes" if feature in m.FEATURES else "–" for m in columns.values()]
        lines.append(f"| `{feature}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _order(op: str) -> list[str]:
    if op == "attention":
        from .attention_options import FEATURES

        return list(FEATURES)
    return sorted({f for name in _TITLES if (m := registry.load(name, op)) is not None for f in m.FEATURES})


def updated(page: str) -> str:
    """``page`` with every table in it as it is now."""
    return _BLOCK.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default all: {', '.join(registry.OPS)}")
    parser.add_argument("--write", action="store_true", help="update docs/ instead of printing")
    args = parser.parse_args()
    if args.write:
        for path in sorted(DOCS.glob("*.md")):
            text = path.read_text(encoding="utf-8")
            if (new := updated(text)) != text:
                path.write_text(new, encoding="utf-8")
                print(f"updated {path}")
        return
    for op in args.ops or registry.OPS:
        print(f"{op}\n\n{table(op)}")


if __name__ == "__main__":
    main()
