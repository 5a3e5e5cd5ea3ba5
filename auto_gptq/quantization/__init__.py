"""Which integers: settings, Hessian, and the GPTQ solver."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _old_names

if TYPE_CHECKING:
    from .config import (
        CHECKPOINT_FORMAT,
        CHECKPOINT_FORMAT_FIELD,
        CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN,
        QUANT_CONFIG_FILENAME,
        QUANT_METHOD,
        QUANT_METHOD_FIELD,
        BaseQuantizeConfig,
    )
    from .gptq import GPTQ
    from .quantizer import Quantizer, quantize

__all__ = [
    "CHECKPOINT_FORMAT",
    "CHECKPOINT_FORMAT_FIELD",
    "CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN",
    "GPTQ",
    "QUANT_CONFIG_FILENAME",
    "QUANT_METHOD",
    "QUANT_METHOD_FIELD",
    "BaseQuantizeConfig",
    "Quantizer",
    "quantize",
]

__getattr__ = _old_names.getter(__name__)
