"""What happened to each module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModuleReport:
    """One quantized linear layer."""

    name: str  # dotted, from the model
    block: int
    error: float  # tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ): the share of the output's energy that is lost
    damp_percent: float  # the damping that was used; 0 if rounded without a Hessian
    tokens: int  # calibration tokens seen
    seconds: float  # spent in the solver
    routed: int | None = None  # tokens that the router sent to this expert; None if it is none


def plot_errors(report: Sequence[ModuleReport], path: str | Path) -> None:
    """Draw the error of every module over the blocks, one line per kind of module.

    Needs matplotlib (``pip install auto-gptq[plot]``).
    """
    from matplotlib.figure import Figure  # not pyplot: nothing global is touched

    kinds: dict[str, list[ModuleReport]] = {}
    for entry in report:
        kinds.setdefault(entry.name.rsplit(".", 1)[-1], []).append(entry)
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
