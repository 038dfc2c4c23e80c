"""The alignment benchmark at a tiny size: a row of ours, and what the table says of two providers."""

import pytest

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (pip install reasoning-gym)")

from benchmarks import rl_language
from benchmarks.rl_language import Run, table


def test_our_row(capsys):
    assert rl_language.main(["--steps", "1", "--seeds", "1", "--start-steps", "1", "--only", "ours"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("start: 1 supervised steps") and lines[-1].split()[0] == "fastformer"


def test_the_table():
    runs = {"fastformer": [Run([0.0, 0.5, 0.5, 1.0], 30.0)], "trl": [Run([0.25] * 8, 10.0)]}
    text = table("gpt", runs)
    assert "1.000 ± 0.000" in text and text.endswith("rollouts/s: 3.00 times TRL's (goal 2: met)")
