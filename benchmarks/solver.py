"""Seconds to solve one matrix on this device: factorization, scales and columns.

Compared, where it is installed, with llm-compressor's solver in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import peers
import torch
from measure import save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from auto_gptq.formats.grid import GridRule
from auto_gptq.kernels import gpu, native
from auto_gptq.quantization.factor import factorize
from auto_gptq.quantization.precision import tensor_cores
from auto_gptq.quantization.solver import SolverOptions, solve, squared_error
from tests.reference import plain_gptq

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
VARIANTS = {
    "groups in order": SolverOptions(GridRule(4), 128),
    "groups in order, signed": SolverOptions(GridRule(4, signed=True), 128),
    "groups in order, min-max": SolverOptions(GridRule(4), 128, scale_search=False),
    "act-order, groups in order, asymmetric": SolverOptions(
        GridRule(4, symmetric=False), 128, act_order=True
    ),
    "act-order, static groups": SolverOptions(GridRule(4), 128, act_order=True, static_groups=True),
    "min-max, static groups": SolverOptions(
        GridRule(4), 128, static_groups=True, scale_search=False
    ),
}


def milliseconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Give the median time of some calls after two that do not count."""
    on_gpu = torch.cuda.is_available()
    times = []
    for _ in range(repeats + 2):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def problem(rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a weight and the Hessian of inputs of uneven size."""
    x = torch.randn(columns + 4096, columns, device=device)
    x *= torch.linspace(0.2, 2, columns, device=device)
    return torch.randn(rows, columns, device=device) * 0.02, x.t() @ x / len(x)


def against_fp64(size: int, device: str) -> float:
    """Give our squared error over that of a plain fp64 solver with the same scales and order."""
    weight, hessian = problem(size, size, device)
    found = solve(weight, hessian, VARIANTS["act-order, static groups"])
    group = found.g_idx.long()
    scales, zeros = found.scales[:, group], found.zeros[:, group]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    codes = plain_gptq(weight, hessian, scales, zeros, 15, 0.01, order)
    theirs = squared_error(weight, (codes - zeros) * scales, hessian)
    return float(squared_error(weight, found.dequantize(), hessian) / theirs)


@contextmanager
def with_triton() -> Iterator[bool]:
    """Let Triton's kernels take the place of the compiled ones, where there are any."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        yield False
        return
    from auto_gptq.kernels import triton_solver

    names = ("solve_columns", "fit_grids")
    patches = [mock.patch.object(torch.ops.auto_gptq, n, getattr(triton_solver, n)) for n in names]
    patches.append(mock.patch.object(gpu, "takes_matrices", lambda *_arguments: False))
    for patch in patches:
        patch.start()
    try:
        yield True
    finally:
        for patch in patches:
            patch.stop()


def peer_row(
    weight: torch.Tensor, hessian: torch.Tensor, act_order: bool, like: dict[str, Any]
) -> dict[str, Any]:
    work = peers.solver(weight, hessian, act_order)
    return like | {
        "variant": f"{peers.NAME}, min-max{', act-order' if act_order else ''}",
        "ms": milliseconds(work),
        "of it factorization": 0.0,
        "error": float(squared_error(weight, work(), hessian)),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--scale", type=int, default=1, help="divide all sizes by this")
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(native.reason())
    rows: list[dict[str, Any]] = []
    exactness = against_fp64(4096 // options.scale, device)
    print(
        f"squared error / that of plain fp64 GPTQ at the same scales: {exactness:.6f}", flush=True
    )
    with_peer = peers.installed() and device == "cuda"
    for n, k in SHAPES:
        weight, hessian = problem(n // options.scale, k // options.scale, device)
        with tensor_cores():
            factor_ms = milliseconds(lambda h=hessian: factorize(h, 0.01))
        for name, settings in VARIANTS.items():
            ms = milliseconds(lambda w=weight, h=hessian, s=settings: solve(w, h, s))
            found = solve(weight, hessian, settings).dequantize()
            error = float(squared_error(weight, found, hessian))
            rows.append(
                {
                    "rows x columns": f"{weight.shape[0]}x{weight.shape[1]}",
                    "variant": name,
                    "ms": ms,
                    "of it factorization": factor_ms,
                    "error": error,
                }
            )
            print(rows[-1], flush=True)
        with with_triton() as there:
            if there:
                settings = VARIANTS["act-order, static groups"]
                ms = milliseconds(lambda w=weight, h=hessian, s=settings: solve(w, h, s))
                found = solve(weight, hessian, settings).dequantize()
                error = float(squared_error(weight, found, hessian))
                name = "act-order, static groups, Triton"
                rows.append(rows[-2] | {"variant": name, "ms": ms, "error": error})
                print(rows[-1], flush=True)
        if with_peer:
            for act_order in (False, True):
                rows.append(peer_row(weight, hessian, act_order, rows[-1]))
                print(rows[-1], flush=True)
    print(table(rows))
    content = {"error / error of plain fp64 GPTQ, 4096x4096": exactness, "rows": rows}
    print(save(f"solver-{device}", content, options.results))


if __name__ == "__main__":
    main()
