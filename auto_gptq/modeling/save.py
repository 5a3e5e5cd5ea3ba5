"""From a quantized model to a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..checkpoint.writer import staged, write_weights
from ..errors import ConfigError
from ..quantization.config import BaseQuantizeConfig
from .load import default_base_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_checkpoint(
    model: PreTrainedModel,
    config: BaseQuantizeConfig,
    save_dir: str | Path,
    *,
    version: str,
    use_safetensors: bool = True,
    safetensors_metadata: dict[str, Any] | None = None,
) -> None:
    """Write weights, ``config.json``, ``quantize_config.json`` and ``generation_config.json``.

    The final names appear only once everything has been written.

    :raises ConfigError: if the metadata is not a dict
    """
    folder = Path(save_dir)
    base_name = config.model_file_base_name or default_base_name(config)
    settings = saved_config(config)
    metadata = _metadata(settings, version, safetensors_metadata)
    model_config = copy.deepcopy(model.config)
    model_config.quantization_config = settings.to_dict()
    with staged(folder) as stage:
        write_weights(
            _tensors(model), stage, base_name, metadata=metadata, use_safetensors=use_safetensors
        )
        (stage / "config.json").write_text(
            model_config.to_json_string(use_diff=False), encoding="utf-8"
        )
        settings.save_pretrained(stage)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(stage)


def saved_config(config: BaseQuantizeConfig) -> BaseQuantizeConfig:
    """Give the settings as a reader has to see them.

    With static groups the processing order left no trace in ``g_idx``; saying ``desc_act: true``
    would make vLLM refuse the checkpoint.  Paths of this machine are nobody's business.
    """
    dynamic = None if config.dynamic is None else copy.deepcopy(config.dynamic)
    for override in (dynamic or {}).values():
        if "desc_act" in override or "static_groups" in override:
            own = replace(config, dynamic=None, **override)
            override["desc_act"] = own.desc_act and not own.static_groups
    return replace(
        config,
        desc_act=config.desc_act and not config.static_groups,
        dynamic=dynamic,
        model_name_or_path=None,
        model_file_base_name=None,
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give all tensors of a model by name, tied parameters once."""
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in written:
            tensors[name] = tensor
        elif not isinstance(tensor, nn.Parameter):  # layers of one input share their g_idx
            tensors[name] = tensor.clone()
        written.add(id(tensor))
    return tensors


def _metadata(
    config: BaseQuantizeConfig, version: str, given: dict[str, Any] | None
) -> dict[str, str]:
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"safetensors_metadata is a {type(given).__name__}; it must be a dict.")
    return {str(key): str(value) for key, value in (given or {}).items()} | {
        "format": "pt",
        "auto_gptq_version": version,
        "gptq_bits": str(config.bits),
        "gptq_group_size": str(config.group_size),
        "gptq_desc_act": str(config.desc_act),
        "gptq_damp_percent": str(config.damp_percent),
        "gptq_checkpoint_format": config.checkpoint_format,
        "gptq_quant_method": config.quant_method,
    }
