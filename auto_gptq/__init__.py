"""Quantize language models with GPTQ, and run them.

Names are imported when they are first used, so that ``import auto_gptq`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _old_names
from ._version import __version__
from .integrations import transformers as _transformers

if TYPE_CHECKING:
    from .modeling._utils import exllama_set_max_input_length
    from .modeling.auto import AutoGPTQForCausalLM
    from .quantization.config import BaseQuantizeConfig

__all__ = [
    "AutoGPTQForCausalLM",
    "BaseQuantizeConfig",
    "__version__",
    "exllama_set_max_input_length",
    "get_gptq_peft_model",
]

_old_names.install()
# The one effect of importing: transformers loads GPTQ models with this package.
_transformers.enable(even_beside_gptqmodel=False)
__getattr__ = _old_names.getter(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
