"""What AutoGPTQ's import_utils told: which kernels can run here, and versions compared."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import operator

import torch
from packaging.version import parse

_OPERATORS = {name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")}

TRITON_AVAILABLE = importlib.util.find_spec("triton") is not None
# One library serves what AutoGPTQ built five of; without it, plain torch does.
AUTOGPTQ_CUDA_AVAILABLE = torch.cuda.is_available()
EXLLAMA_KERNELS_AVAILABLE = AUTOGPTQ_CUDA_AVAILABLE
EXLLAMAV2_KERNELS_AVAILABLE = AUTOGPTQ_CUDA_AVAILABLE
MARLIN_AVAILABLE = AUTOGPTQ_CUDA_AVAILABLE
MARLIN_EXCEPTION = None if MARLIN_AVAILABLE else "torch finds no CUDA device"
QIGEN_AVAILABLE = False
QIGEN_EXCEPTION = "QIGen is not part of this package; QuantLinear has CPU kernels of its own."


def compare_transformers_version(version: str = "v4.28.0", op: str = "eq") -> bool:
    """Compare the installed transformers with a version."""
    return _compare(importlib.metadata.version("transformers"), version, op)


def compare_pytorch_version(version: str = "v2.0.0", op: str = "eq") -> bool:
    """Compare the installed torch with a version."""
    return _compare(torch.__version__, version, op)


def _validate_marlin_device_support() -> bool:
    """Tell whether Marlin's own kernel could run: compute capability 8.0 or more."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def _compare(installed: str, version: str, op: str) -> bool:
    if op not in _OPERATORS:
        raise AssertionError(f"op is {op!r}; it must be one of {', '.join(_OPERATORS)}.")
    return bool(_OPERATORS[op](parse(installed), parse(version)))
