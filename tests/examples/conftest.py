"""Nothing installed on the machine and nothing of the network reaches these tests."""

import pytest

from fastformer.data import packages


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "installed", lambda module: [])
    monkeypatch.setattr(packages, "ROOT", tmp_path / "root")
    monkeypatch.setenv("FASTFORMER_DATA", str(tmp_path / "cache"))
