"""Quantized linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import _old_names

if TYPE_CHECKING:
    from .linear import QuantLinear
    from .variants import GeneralQuantLinear

__all__ = ["GeneralQuantLinear", "QuantLinear"]

__getattr__ = _old_names.getter(__name__)
