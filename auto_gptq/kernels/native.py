"""The compiled library ``auto_gptq/_native.so``: load it once, remember why it is missing."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_LIBRARY = Path(__file__).resolve().parent.parent / "_native.so"


@functools.cache
def _failure() -> str | None:
    """Load the library, which registers its operators with torch; give what went wrong."""
    if not _LIBRARY.is_file():
        return f"{_LIBRARY} does not exist: the package was built without a compiler or torch"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY} cannot be loaded into torch {torch.__version__}: {error}"
    return None


def load() -> bool:
    """Load the library at the first call; tell whether it is there."""
    return _failure() is None


def reason() -> str:
    """Say in one sentence why the library is missing, or that it is loaded."""
    return _failure() or f"{_LIBRARY} is loaded"


def has_cuda() -> bool:
    """Tell whether the library was built with its CUDA kernels."""
    return load() and torch._C._dispatch_has_kernel_for_dispatch_key("auto_gptq::q_matmul", "CUDA")
