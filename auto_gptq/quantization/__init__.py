"""Which integers: settings, Hessian, and the GPTQ solver."""

from __future__ import annotations

from .config import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_FORMAT_FIELD,
    CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN,
    QUANT_CONFIG_FILENAME,
    QUANT_METHOD,
    QUANT_METHOD_FIELD,
    BaseQuantizeConfig,
)

__all__ = [
    "CHECKPOINT_FORMAT",
    "CHECKPOINT_FORMAT_FIELD",
    "CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN",
    "QUANT_CONFIG_FILENAME",
    "QUANT_METHOD",
    "QUANT_METHOD_FIELD",
    "BaseQuantizeConfig",
]
