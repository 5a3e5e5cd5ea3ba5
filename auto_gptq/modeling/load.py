"""From files to models: full precision before quantizing, packed after."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import hub
from ..checkpoint.reader import WeightFiles, find_weights, read_shapes, read_tensors
from ..errors import CheckpointError
from ..nn_modules.qlinear.linear import QuantLinear
from ..nn_modules.surgery import empty_quant_linear, find_linears, output_head, replace, untie
from ..quantization.config import BaseQuantizeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_MOST_NAMES_SHOWN = 8


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

    A linear is quantized exactly if the checkpoint has its ``qweight``.

    :raises CheckpointError: if tensors are missing, superfluous in place of others, or misshapen
    """
    shapes = read_shapes(weights)
    model = _skeleton(model_config, torch_dtype, trust_remote_code)
    head = output_head(model)
    if head is not None and f"{head}.qweight" in shapes:
        untie(model, head)
    _insert_quant_linears(model, shapes, config)
    _check_names_and_shapes(model, shapes, weights, config)
    for name, tensor in read_tensors(weights):
        if name in shapes:
            _assign(model, name, tensor, torch_dtype)
    model.tie_weights()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.check(name)
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
    model: nn.Module, shapes: dict[str, list[int]], config: BaseQuantizeConfig
) -> None:
    linears = find_linears(model)
    packed = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    foreign = [name for name in packed if name not in linears]
    if foreign or not packed:
        raise CheckpointError(
            "The checkpoint holds no packed weights (`*.qweight`); is it a full-precision model?"
            if not packed
            else f"The checkpoint holds packed weights for {_some(foreign)}, which are no linear "
            f"layers of {type(model).__name__}."
        )
    layers = []
    for name in packed:
        settings = config.settings_for(name) or config
        layer = empty_quant_linear(
            linears[name], settings.bits, settings.group_size, config.checkpoint_format
        )
        layers.append((name, layer))
    replace(model, layers)


def _check_names_and_shapes(
    model: nn.Module,
    shapes: dict[str, list[int]],
    weights: WeightFiles,
    config: BaseQuantizeConfig,
) -> None:
    """Compare the checkpoint's tensors with the model's before any is loaded."""
    where = weights.files[0].parent
    expected = model.state_dict()
    tied = _tied_names(model)
    missing = [
        name
        for name in expected
        if name not in shapes
        and not any(twin in shapes for twin in tied.get(name, ()))
        and not (name.endswith(".g_idx") and _is_contiguous(name, config))
    ]
    if missing:
        raise CheckpointError(
            f"The checkpoint in {where} lacks {len(missing)} tensors: {_some(missing)}. "
            "It is incomplete, or belongs to another model."
        )
    for name, tensor in expected.items():
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{name} has shape {shapes[name]} in {where}, but the model and the quantization "
                f"config (bits, group_size) ask for {list(tensor.shape)}."
            )
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        logger.warning("Ignoring tensors that the model does not have: %s", _some(unexpected))
        for name in unexpected:
            del shapes[name]


def _is_contiguous(g_idx: str, config: BaseQuantizeConfig) -> bool:
    """Tell where g_idx says nothing new, so that some tools leave it out."""
    settings = config.settings_for(g_idx.removesuffix(".g_idx")) or config
    return settings.group_size == -1 or settings.static_groups or not settings.desc_act


def _tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Give, for each parameter's name, all names of the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() for name in group}


def _assign(model: nn.Module, name: str, tensor: Tensor, torch_dtype: torch.dtype) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, QuantLinear):
        if leaf == "g_idx":
            tensor = tensor.to(torch.int32)
        setattr(owner, leaf, tensor)  # as stored: scales keep their precision
        return
    if tensor.is_floating_point():
        tensor = tensor.to(torch_dtype)
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES_SHOWN])
    more = len(names) - _MOST_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
