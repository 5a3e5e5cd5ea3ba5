"""Let Triton serve GPUs for which the compiled library has nothing."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

from . import native, ops

logger = logging.getLogger(__name__)

_SOLVER = ("solve_columns", "fit_grids")


@functools.cache
def load_solver() -> None:
    """Register the solver's kernels for GPUs, at the first call: ours, or else Triton's."""
    native.load()
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    missing = [name for name in _SOLVER if not _has_kernel(name)]
    if missing:
        from . import triton_solver

        library = _library()
        for name in missing:
            library.impl(name, getattr(triton_solver, name), "CUDA")
        logger.info("The solver runs on Triton: %s.", native.reason())


def _has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"auto_gptq::{name}", "CUDA")


@functools.cache  # what it registers lives as long as it does
def _library() -> torch.library.Library:
    return torch.library.Library("auto_gptq", "IMPL")


_ = ops  # importing it defines the operators
