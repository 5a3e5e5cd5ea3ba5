"""The report: what is written, what is warned about, and the bar."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq.pipeline.progress import Progress
from auto_gptq.pipeline.report import (
    ModuleReport,
    find_warnings,
    plot_errors,
    summary,
    table,
    write_report,
)


def _entry(block: int, kind: str = "mlp.up_proj", **changes: Any) -> ModuleReport:
    values = {"error": 0.01, "damp_percent": 0.01, "tokens": 4096, "seconds": 0.5} | changes
    return ModuleReport(name=f"model.layers.{block}.{kind}", block=block, **values)


def test_what_looks_wrong_is_said_the_worst_first() -> None:
    report = [_entry(i) for i in range(5)]
    assert find_warnings(report, 0.01) == []
    report[2] = _entry(2, error=0.4)
    report[3] = _entry(3, error=0.2, damp_percent=0.1)
    report[4] = _entry(4, note="saw 3 calibration tokens")
    large, outlier, damped, noted = find_warnings(report, 0.01)
    assert large.startswith("model.layers.2.mlp.up_proj loses 40% of its output's energy")
    assert "loses 20.00% of its output's energy, 20 times the median of the up_proj" in outlier
    assert "model.layers.3.mlp.up_proj was solved with damp_percent 0.1 instead of 0.01" in damped
    assert noted == "model.layers.4.mlp.up_proj: saw 3 calibration tokens"
    text = summary(report, 0.01)
    assert "up_proj  5" in text
    assert f"! {large}" in text


def test_files_hold_what_the_list_holds(tmp_path: Path) -> None:
    report = [_entry(0), _entry(1, "mlp.down_proj", note='with "quotes", and commas')]
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "quantization_report.json").read_text())
    assert [ModuleReport(**entry) for entry in written["modules"]] == report
    with (tmp_path / "quantization_report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [entry.name for entry in report]
    assert rows[1]["note"] == report[1].note
    assert float(rows[0]["error"]) == report[0].error
    assert len(table(report).splitlines()) == 3


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_errors([_entry(0), _entry(1)], tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_the_bar_counts_blocks_and_shows_the_last_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(2, 1000, torch.device("cpu"), shown=True) as progress:
        for block in range(2):
            progress.module_done(_entry(block))
            progress.block_done()
        progress.module_done(_entry(1))
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "model.layers.1.mlp.up_proj, error 1.00%" in shown
    assert "tokens/s" in shown
    assert " GB" in shown


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, 1000, torch.device("cpu")) as progress:
        progress.module_done(_entry(0))
        progress.block_done()
    assert capsys.readouterr().err == ""
