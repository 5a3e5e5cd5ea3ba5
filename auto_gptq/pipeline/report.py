"""What happened to each module: lines, files, a plot, and what looks wrong."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# An error above this share of the output's energy hurts any model.
_LARGE_ERROR = 0.25
# Errors of modules of one kind lie close together; one this many times their median stands out.
_OUTLIER = 10
_LEAST_OUTLIER = 0.01  # an error below this harms nobody, whatever the others are
_WARNINGS_SHOWN = 8


@dataclass(frozen=True)
class ModuleReport:
    """One quantized linear layer."""

    name: str  # dotted, from the model
    block: int
    error: float  # tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ): the share of the output's energy that is lost
    damp_percent: float  # the damping that was used; 0 if rounded without a Hessian
    tokens: int  # calibration tokens seen
    seconds: float  # spent in the solver
    note: str = ""  # what was done otherwise than asked for, and why
    routed: int | None = None  # tokens that the router sent to this expert; None if it is none

    @property
    def kind(self) -> str:
        """Its name inside a block: "down_proj"."""
        return self.name.rsplit(".", 1)[-1]


def find_warnings(report: Sequence[ModuleReport], damp_percent: float | None = None) -> list[str]:
    """Say what looks wrong, one sentence per module, the worst first.

    :param damp_percent: the damping that was asked for
    """
    kinds: dict[str, list[float]] = {}
    for entry in report:
        kinds.setdefault(entry.kind, []).append(entry.error)
    found = []
    for entry in sorted(report, key=lambda entry: -entry.error):
        usual = statistics.median(kinds[entry.kind])
        if entry.note:
            found.append(f"{entry.name}: {entry.note}")
        if entry.error > _LARGE_ERROR:
            found.append(
                f"{entry.name} loses {entry.error:.0%} of its output's energy; quantize it with "
                "more bits, or leave it out, by `dynamic`."
            )
        elif entry.error > max(_OUTLIER * usual, _LEAST_OUTLIER):
            found.append(
                f"{entry.name} loses {entry.error:.2%} of its output's energy, "
                f"{entry.error / usual:.0f} times the median of the {entry.kind}."
            )
        if damp_percent is not None and entry.damp_percent > damp_percent:
            found.append(
                f"{entry.name} was solved with damp_percent {entry.damp_percent:g} instead of "
                f"{damp_percent:g}: its Hessian was not positive definite."
            )
    return found


def summary(report: Sequence[ModuleReport], damp_percent: float | None = None) -> str:
    """Give a table of the kinds of modules, and what looks wrong."""
    kinds: dict[str, list[ModuleReport]] = {}
    for entry in report:
        kinds.setdefault(entry.kind, []).append(entry)
    rows = [("modules", "number", "median error", "largest", "in", "tokens", "seconds")]
    for kind, entries in kinds.items():
        worst = max(entries, key=lambda entry: entry.error)
        rows.append(
            (
                kind,
                str(len(entries)),
                f"{statistics.median(e.error for e in entries):.3%}",
                f"{worst.error:.3%}",
                worst.name.removesuffix(f".{kind}"),
                str(min(e.tokens for e in entries)),
                f"{sum(e.seconds for e in entries):.1f}",
            )
        )
    warnings = find_warnings(report, damp_percent)
    shown = warnings[:_WARNINGS_SHOWN]
    if len(warnings) > len(shown):
        shown.append(f"{len(warnings) - len(shown)} more warnings are in the report's JSON.")
    return "\n".join([*_aligned(rows), *(f"! {line}" for line in shown)])


def table(report: Sequence[ModuleReport]) -> str:
    """Give one line per module."""
    rows = [("module", "error", "damping", "tokens", "seconds", "")]
    rows += [
        (e.name, f"{e.error:.3%}", f"{e.damp_percent:g}", str(e.tokens), f"{e.seconds:.2f}", e.note)
        for e in report
    ]
    return "\n".join(_aligned(rows))


def write_report(
    report: Sequence[ModuleReport], folder: Path, damp_percent: float | None = None
) -> None:
    """Write ``quantization_report.json`` and ``.csv`` into a folder."""
    entries: list[dict[str, Any]] = [asdict(entry) for entry in report]
    content = {"warnings": find_warnings(report, damp_percent), "modules": entries}
    path = folder / "quantization_report.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ModuleReport)])
        writer.writeheader()
        writer.writerows(entries)


def plot_errors(report: Sequence[ModuleReport], path: str | Path) -> None:
    """Draw the error of every module over the blocks, one line per kind of module.

    Needs matplotlib (``pip install auto-gptq[plot]``).
    """
    from matplotlib.figure import Figure  # not pyplot: nothing global is touched

    kinds: dict[str, list[ModuleReport]] = {}
    for entry in report:
        kinds.setdefault(entry.kind, []).append(entry)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, entries in kinds.items():
        axes.plot(
            [e.block for e in entries], [100 * e.error for e in entries], marker=".", label=kind
        )
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("output error, % of energy")
    axes.set_title("Error of each quantized layer on the calibration tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
