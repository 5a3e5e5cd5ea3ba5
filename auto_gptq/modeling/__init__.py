"""The objects users hold."""

from __future__ import annotations

from ..quantization.config import BaseQuantizeConfig
from ._base import BaseGPTQForCausalLM
from .auto import AutoGPTQForCausalLM

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig"]
