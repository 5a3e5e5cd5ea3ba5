"""Quantize language models with GPTQ, and run them.

Names are imported when they are first used, so that ``import auto_gptq`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .modeling.auto import AutoGPTQForCausalLM
    from .quantization.config import BaseQuantizeConfig

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig", "__version__"]

_HOMES = {
    "AutoGPTQForCausalLM": "auto_gptq.modeling.auto",
    "BaseQuantizeConfig": "auto_gptq.quantization.config",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'auto_gptq' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
