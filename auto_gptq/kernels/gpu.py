"""Let Triton serve GPUs for which the compiled library has nothing."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

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


def takes_matrices(
    weight: Tensor,  # [N, K]
    group_size: int,  # of groups that are fitted on the way, or 0
) -> bool:
    """Tell whether the compiled ``solve_matrix`` serves a weight: then in one launch.

    Elsewhere, and for odd shapes, plain torch goes through it in blocks of columns.
    """
    if not weight.is_cuda or not _has_kernel("solve_matrix"):
        return False
    rows, columns = weight.shape
    regular = group_size == 0 or (group_size >= 4 and 128 % group_size == 0)
    major, _minor = torch.cuda.get_device_capability(weight.device)
    return regular and rows % 4 == 0 and columns % 4 == 0 and major >= 8


@functools.cache  # what it registers lives as long as it does
def _library() -> torch.library.Library:
    return torch.library.Library("auto_gptq", "IMPL")


_ = ops  # importing it defines the operators
