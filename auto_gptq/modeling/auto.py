"""``AutoGPTQForCausalLM``: picks the class for a model type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..architectures import find
from ..quantization.config import BaseQuantizeConfig
from . import _const, load
from ._base import BaseGPTQForCausalLM


class AutoGPTQForCausalLM:
    """Loads models to quantize and quantized models; never instantiated itself."""

    def __init__(self) -> None:
        raise OSError(
            "AutoGPTQForCausalLM is not instantiated; use AutoGPTQForCausalLM.from_pretrained() "
            "or AutoGPTQForCausalLM.from_quantized()."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: dict[Any, Any] | None = None,
        trust_remote_code: bool = False,
        **model_init_kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a full-precision model in order to quantize it.

        :raises UnsupportedModelError: (a TypeError) for a model type without a row
        """
        config = load.load_config(
            pretrained_model_name_or_path, trust_remote_code, **model_init_kwargs
        )
        if config.model_type not in _const.SUPPORTED_MODELS:
            find(config.model_type)
        return BaseGPTQForCausalLM.from_pretrained(
            pretrained_model_name_or_path,
            quantize_config,
            max_memory,
            trust_remote_code,
            **model_init_kwargs,
        )

    @classmethod
    def from_quantized(
        cls, model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> BaseGPTQForCausalLM:
        """Load a quantized checkpoint: see :meth:`BaseGPTQForCausalLM.from_quantized`."""
        return BaseGPTQForCausalLM.from_quantized(model_name_or_path, *args, **kwargs)
