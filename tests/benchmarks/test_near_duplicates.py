"""The near-duplicate benchmark at a small size: everyone's row, and removals that agree with what was put in."""

import pytest

pytest.importorskip("rensa", reason="the package rensa is not installed")

from benchmarks import near_duplicates


def test_every_provider_has_a_row(capsys):
    assert near_duplicates.main(["--megabytes", "0.2", "--rounds", "1"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert {"ours", "rensa"} <= set(rows)
    speed, found, others = rows["ours"]
    assert float(speed) > 0 and float(found.rstrip("%")) > 85 and others == "0"


def test_peers_that_are_not_installed_are_named(capsys, monkeypatch):
    monkeypatch.setattr(near_duplicates.importlib.util, "find_spec", lambda name: None)
    assert near_duplicates.main(["--megabytes", "0.02", "--rounds", "1"]) == 0
    assert "not installed: rensa, datasketch" in capsys.readouterr().out
