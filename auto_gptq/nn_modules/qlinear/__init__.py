"""Quantized linear layers."""

from __future__ import annotations

from .linear import QuantLinear

__all__ = ["QuantLinear"]
