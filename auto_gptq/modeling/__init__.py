"""The objects users hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _old_names

if TYPE_CHECKING:
    from ..quantization.config import BaseQuantizeConfig
    from ._base import BaseGPTQForCausalLM
    from .auto import GPTQ_CAUSAL_LM_MODEL_MAP, AutoGPTQForCausalLM

__all__ = [
    "GPTQ_CAUSAL_LM_MODEL_MAP",
    "AutoGPTQForCausalLM",
    "BaseGPTQForCausalLM",
    "BaseQuantizeConfig",
]

__getattr__ = _old_names.getter(__name__)
