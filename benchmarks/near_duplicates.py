"""Near-duplicate removal on one core: MB of text a second, beside datasketch and rensa on the same documents.

    python benchmarks/near_duplicates.py --megabytes 10     --keep writes the table to benchmarks/results/<machine>/

All three make shingles of five words in lower case, signatures of 128 hashes, and remove what is at least 0.8 similar
to a document kept before; datasketch and rensa are given each shingle as a text, as their own examples do. datasketch
sees the first documents only, so that a round of it takes seconds. Rounds take turns and medians are shown; ``found``
is how many of the copies that were put in (one document in five, with a word in two hundred replaced) went out,
``others`` how many documents that are no copies."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

from benchmarks.machine import keep  # noqa: E402
from fastformer.data import NearDuplicates, load_corpus  # noqa: E402

THRESHOLD, HASHES, SHINGLE = 0.8, 128, 5
DATASKETCH_PART = 10  # datasketch gets the first tenth
GOAL = 20.0  # MB/s
BATCH = 512
_WORD = re.compile(r"[^\W_]+")


def documents(megabytes: float, seed: int = 0) -> tuple[list[str], list[bool]]:
    """Texts of 50 to 1000 words drawn from the language reference, and which of them are nearly copies."""
    draw = random.Random(seed)
    words = load_corpus("python").text.split()
    texts: list[str] = []
    copies: list[bool] = []
    size = 0
    while size < megabytes * 1e6:
        copy = bool(texts) and draw.random() < 0.2
        if copy:
            text = draw.choice(texts).split()
            for _ in range(1 + len(text) // 200):
                text[draw.randrange(len(text))] = draw.choice(words)
        else:
            text = draw.choices(words, k=draw.randint(50, 1000))
        texts.append(" ".join(text))
        copies.append(copy)
        size += len(texts[-1])
    return texts, copies


def shingles(text: str) -> list[str]:
    """Runs of five words, for the packages that take texts."""
    words = _WORD.findall(text.lower())
    return [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]


def ours(texts: list[str]) -> list[bool]:
    finder = NearDuplicates(THRESHOLD, SHINGLE, num_hashes=HASHES)
    batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    return [repeat is not None for batch in batches for repeat in finder.add(batch)]


def rensa(texts: list[str]) -> list[bool]:
    from rensa import RMinHashDeduplicator

    finder = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=HASHES, use_lsh=True)
    return [not new for new in finder.add_pairs((str(number), shingles(text)) for number, text in enumerate(texts))]


def datasketch(texts: list[str]) -> list[bool]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=HASHES)
    removed = []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=HASHES)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        removed.append(bool(index.query(sketch)))
        if not removed[-1]:
            index.insert(number, sketch)
    return removed


PROVIDERS: dict[str, Callable[[list[str]], list[bool]]] = {"ours": ours, "rensa": rensa, "datasketch": datasketch}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=10.0, help="of text; default 10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args(arguments)
    texts, copies = documents(options.megabytes)
    missing = [name for name in PROVIDERS if name != "ours" and importlib.util.find_spec(name) is None]
    providers = {name: provider for name, provider in PROVIDERS.items() if name not in missing}
    parts = {name: texts[: len(texts) // DATASKETCH_PART] if name == "datasketch" else texts for name in providers}
    ours(texts[:1])  # tables and imports
    speeds: dict[str, list[float]] = {name: [] for name in providers}
    removed = {}
    for _ in range(options.rounds):
        for name, provider in providers.items():
            started = time.perf_counter()
            removed[name] = provider(parts[name])
            speeds[name].append(sum(map(len, parts[name])) / 1e6 / (time.perf_counter() - started))
    lines = [f"{len(texts):,} documents, {sum(copies):,} of them copies; {options.rounds} rounds, one core"]
    lines.append(f"{'':12s}{'MB/s':>8s}{'found':>10s}{'others':>8s}")
    for name, answers in removed.items():
        pairs = list(zip(answers, copies))
        found = sum(answer and copy for answer, copy in pairs) / max(1, sum(copy for _, copy in pairs))
        others = sum(answer and not copy for answer, copy in pairs)
        lines.append(f"{name:12s}{statistics.median(speeds[name]):8.1f}{found:10.1%}{others:8d}")
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    reached = statistics.median(speeds["ours"]) >= GOAL
    lines.append(f"goal: {GOAL:.0f} MB/s, {'reached' if reached else 'not reached'}")
    print("\n".join(lines))
    if options.keep:
        keep(
            "near_duplicates",
            "\n".join(lines),
            f"python benchmarks/near_duplicates.py --megabytes {options.megabytes:g}",
        )
    return 0


if __name__ == "__main__":
    os.environ["RAYON_NUM_THREADS"] = "1"  # rensa's threads, started when it first computes
    sys.exit(main())
