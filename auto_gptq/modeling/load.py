"""From files to models: full precision before quantizing, packed after."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import hub
from ..checkpoint.fill import fill, some
from ..checkpoint.layouts import find_packed
from ..checkpoint.reader import WeightFiles, find_weights, read_headers
from ..errors import CheckpointError
from ..formats.gptq import middle_zeros
from ..formats.marlin import find_obstacle
from ..nn_modules.qlinear.linear import QuantLinear, check_shape
from ..nn_modules.surgery import (
    empty_quant_linear,
    features,
    find_linears,
    output_head,
    replace,
    untie,
)
from ..quantization.config import CHECKPOINT_FORMAT, BaseQuantizeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_dense(
    source: str | Path, torch_dtype: torch.dtype, trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    """Load a full-precision model with transformers."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch_dtype, trust_remote_code=trust_remote_code, **kwargs
    )
    model.eval()
    return model


def load_config(source: str | Path, trust_remote_code: bool, **kwargs: Any) -> PretrainedConfig:
    """Load a model's configuration with transformers."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(
        source, trust_remote_code=trust_remote_code, **hub.hub_arguments(kwargs)
    )
    return config


def find_quantized_weights(
    source: str | Path,
    config: BaseQuantizeConfig,
    model_basename: str | None,
    use_safetensors: bool,
    **kwargs: Any,
) -> WeightFiles:
    """Find the weights under the names that AutoGPTQ looked for, in its order."""
    if model_basename:
        base_names = [model_basename]
    elif config.model_file_base_name:
        base_names = [config.model_file_base_name]
    else:
        base_names = [default_base_name(config), "model"]
    extensions = [".safetensors"] if use_safetensors else [".bin", ".pt"]
    return find_weights(source, base_names, extensions, **kwargs)


def default_base_name(config: BaseQuantizeConfig) -> str:
    """Give the file name, without extension, that AutoGPTQ chose."""
    return f"gptq_model-{config.bits}bit-{config.group_size}g"


def load_packed(
    model_config: PretrainedConfig,
    weights: WeightFiles,
    config: BaseQuantizeConfig,
    torch_dtype: torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Build the model around the checkpoint's packed tensors and load all of them.

    In memory every layer holds GPTQ's tensors, whatever the layout on disk.

    A linear is quantized exactly if the checkpoint has its ``qweight``, or Marlin's ``B``.

    :raises CheckpointError: if tensors are missing, superfluous in place of others, misshapen, of
        a wrong dtype or damaged
    """
    headers = read_headers(weights)
    model = _skeleton(model_config, torch_dtype, trust_remote_code)
    head = output_head(model)
    if head is not None and head in find_packed(headers, config.checkpoint_format):
        untie(model, head)
    layouts = _insert_quant_linears(model, headers, config)
    contiguous = {name for name in layouts if (config.settings_for(name) or config).contiguous}
    fill(model, weights, headers, layouts, torch_dtype=torch_dtype, contiguous=contiguous)
    model.tie_weights()
    model.eval()
    return model


def _skeleton(
    config: PretrainedConfig, torch_dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Build the model with parameters on the meta device and buffers for real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config.__dict__.pop("quantization_config", None)  # transformers would want its own backend
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def _insert_quant_linears(
    model: nn.Module, names: Iterable[str], config: BaseQuantizeConfig
) -> dict[str, str]:
    """Put a QuantLinear in place for each packed linear, and give each one's layout on disk."""
    linears = find_linears(model)
    layouts = find_packed(names, config.checkpoint_format)
    foreign = [name for name in layouts if name not in linears]
    if foreign or not layouts:
        raise CheckpointError(
            "The checkpoint holds no packed weights (`*.qweight`, or `*.B` and `*.s`); "
            "is it a full-precision model?"
            if not layouts
            else f"The checkpoint holds packed weights for {some(foreign)}, which are no linear "
            f"layers of {type(model).__name__}."
        )
    layers = []
    for name, layout in layouts.items():
        own = config.settings_for(name) or config
        check_shape(name, *features(linears[name]), own.group_size)
        layer = empty_quant_linear(linears[name], own.bits, own.group_size, layout)
        if layout == CHECKPOINT_FORMAT.MARLIN:
            _prepare_marlin(name, layer)
        layers.append((name, layer))
    replace(model, layers)
    return layouts


def _prepare_marlin(name: str, layer: QuantLinear) -> None:
    """Fill in what Marlin does not store."""
    obstacle = find_obstacle(
        layer.bits, layer.in_features, layer.out_features, layer.group_size, symmetric=True
    )
    if obstacle is not None:
        raise CheckpointError(
            f"{name} lies in the checkpoint as Marlin tensors, but {obstacle}: the quantization "
            "config (bits, group_size) belongs to another checkpoint."
        )
    groups, out_features = layer.scales.shape
    layer.qzeros = middle_zeros(groups, out_features, layer.bits, layer.checkpoint_format)
