"""``AutoGPTQForCausalLM``: picks the class for a model type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import _old_names, hub
from ..quantization.config import BaseQuantizeConfig
from ._base import BaseGPTQForCausalLM
from ._utils import check_and_get_model_type
from .wrappers import BY_MODEL_TYPE

# Users put their own classes into it.
GPTQ_CAUSAL_LM_MODEL_MAP: dict[str, type[BaseGPTQForCausalLM]] = dict(BY_MODEL_TYPE)

__getattr__ = _old_names.getter(__name__)


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
        quantize_config: BaseQuantizeConfig | dict[str, Any],
        max_memory: dict[Any, Any] | None = None,
        trust_remote_code: bool = False,
        **model_init_kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a full-precision model in order to quantize it.

        :raises UnsupportedModelError: (a TypeError) for a model type that nobody can build
        """
        model_class = _class_for(
            pretrained_model_name_or_path, trust_remote_code, model_init_kwargs
        )
        return model_class.from_pretrained(
            pretrained_model_name_or_path,
            quantize_config,
            max_memory,
            trust_remote_code,
            **model_init_kwargs,
        )

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: str | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        use_triton: bool = False,
        inject_fused_attention: bool = False,
        inject_fused_mlp: bool = False,
        use_cuda_fp16: bool = True,
        quantize_config: BaseQuantizeConfig | dict[str, Any] | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        warmup_triton: bool = False,
        trainable: bool = False,
        disable_exllama: bool | None = None,
        disable_exllamav2: bool = False,
        use_marlin: bool = False,
        use_tritonv2: bool = False,
        **kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a quantized checkpoint: see :meth:`BaseGPTQForCausalLM.from_quantized`.

        :raises UnsupportedModelError: (a TypeError) for a model type that nobody can build
        """
        model_class = _class_for(model_name_or_path, trust_remote_code, kwargs)
        return model_class.from_quantized(
            model_name_or_path,
            device_map=device_map,
            max_memory=max_memory,
            device=device,
            low_cpu_mem_usage=low_cpu_mem_usage,
            use_triton=use_triton,
            inject_fused_attention=inject_fused_attention,
            inject_fused_mlp=inject_fused_mlp,
            use_cuda_fp16=use_cuda_fp16,
            quantize_config=quantize_config,
            model_basename=model_basename,
            use_safetensors=use_safetensors,
            trust_remote_code=trust_remote_code,
            warmup_triton=warmup_triton,
            trainable=trainable,
            disable_exllama=disable_exllama,
            disable_exllamav2=disable_exllamav2,
            use_marlin=use_marlin,
            use_tritonv2=use_tritonv2,
            **kwargs,
        )


def _class_for(
    source: str | Path, trust_remote_code: bool, kwargs: dict[str, Any]
) -> type[BaseGPTQForCausalLM]:
    model_type = check_and_get_model_type(source, trust_remote_code, **hub.hub_arguments(kwargs))
    return GPTQ_CAUSAL_LM_MODEL_MAP.get(model_type, BaseGPTQForCausalLM)
