"""The figures in README and in the documentation are those of the committed result files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The first and the last row follow where a page shows a part of a table.
TABLE = re.compile(r"<!-- table: ([\w.-]+)(?: rows (\d+)-(\d+))? -->\n((?:\|.*\n)+)")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_table_is_generated_from_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    from measure import table

    found = {page: TABLE.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    assert found[PAGES[0]], "README has no table that is marked as generated"
    for page, tables in found.items():
        assert page.read_text(encoding="utf-8").count("<!-- table: ") == len(tables), page
        for name, first, last, text in tables:
            results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
            rows = results["rows"][int(first) : int(last) + 1] if first else results["rows"]
            assert text.rstrip("\n") == table(rows), (page.name, name)
            assert {"device", "torch", "date", "commit"} <= set(results["environment"]), name
