"""The figures in README are those of the committed result files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"<!-- table: ([\w.-]+) -->\n((?:\|.*\n)+)")


def test_every_table_is_generated_from_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    from measure import table

    found = TABLE.findall((ROOT / "README.md").read_text())
    assert found, "README has no table that is marked as generated"
    for name, text in found:
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert text.rstrip("\n") == table(results["rows"]), name
        assert {"device", "torch", "date", "commit"} <= set(results["environment"]), name
