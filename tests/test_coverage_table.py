"""The tables of what each backend covers: in docs/ as the registry has them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the tables have a column for Triton")

from fastformer.backends import coverage, registry


@pytest.mark.parametrize("page", sorted(coverage.DOCS.glob("*.md")), ids=lambda p: p.name)
def test_pages_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert coverage.updated(text) == text, "run: python -m fastformer.backends.coverage --write"


def test_the_page_on_attention_has_its_table():
    assert "<!-- coverage: attention -->\n| | CPU |" in (coverage.DOCS / "attention.md").read_text(encoding="utf-8")


def test_a_cell_is_what_the_registry_answers():
    rows = dict(line.strip("| ").split(" | ", 1) for line in coverage.table("attention").splitlines()[2:])
    assert rows["float64"].split(" | ")[0] == "yes" and rows["float64"].split(" | ")[1] == "–"
    for feature in registry.load("cpu", "attention").FEATURES:
        assert rows[f"`{feature}`"].split(" | ")[0] == "yes"


def test_unknown_operation():
    with pytest.raises(ValueError, match="op: 'sort' is not one of"):
        coverage.table("sort")
