"""From files to models: full precision before quantizing, packed after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import hub
from ..checkpoint.blocks import DiskWeights
from ..checkpoint.fill import fill, some
from ..checkpoint.layouts import find_packed
from ..checkpoint.names import converted, convertible, in_model, packed_owners
from ..checkpoint.reader import Header, WeightFiles, find_weights, read_headers, read_tensors
from ..errors import CheckpointError, MissingFileError
from ..formats.gptq import middle_zeros
from ..formats.marlin import find_obstacle
from ..nn_modules.experts import expert_parents, find_fused, unfuse
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
from ..quantization.dynamic import find_pattern

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_dense(
    source: str | Path, torch_dtype: torch.dtype, trust_remote_code: bool, **kwargs: Any
) -> tuple[PreTrainedModel, None]:
    """Load a full-precision model with transformers."""
    config = load_config(source, trust_remote_code, **kwargs)
    model: PreTrainedModel = auto_class(config).from_pretrained(
        source, dtype=torch_dtype, trust_remote_code=trust_remote_code, **kwargs
    )
    model.eval()
    return model, None


def open_dense(
    source: str | Path, torch_dtype: torch.dtype, trust_remote_code: bool, **kwargs: Any
) -> tuple[PreTrainedModel, DiskWeights]:
    """Build a full-precision model without its weights, and say where these lie on disk.

    :raises MissingFileError: if there are no safetensors files
    :raises CheckpointError: if these do not hold what the model needs
    """
    weights = find_weights(source, ["model"], [".safetensors"], **kwargs)
    model_config = load_config(source, trust_remote_code, **kwargs)
    if kwargs.get("attn_implementation"):
        model_config._attn_implementation = kwargs["attn_implementation"]
    model = skeleton(model_config, torch_dtype, trust_remote_code)
    unfuse(model)  # experts lie one by one
    model.eval()
    return model, DiskWeights(model, weights, torch_dtype)


def load_config(source: str | Path, trust_remote_code: bool, **kwargs: Any) -> PretrainedConfig:
    """Load a model's configuration with transformers.

    :raises MissingFileError: (a FileNotFoundError) if there is no such model, or no config.json
    :raises CheckpointError: (a ValueError) if transformers cannot make anything of that
    """
    from transformers import AutoConfig

    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise MissingFileError(
            f"{source} is neither a folder (seen from {Path.cwd()}) nor the id of a model."
        )
    file = hub.find_file(source, "config.json", **kwargs)
    if file is None:
        raise MissingFileError(f"{source} has no config.json, so it is not a model.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, **hub.hub_arguments(kwargs)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}") from error
    return config


def auto_class(config: PretrainedConfig) -> Any:
    """Give transformers' class that builds a model of text: one that sees or hears, if need be."""
    return next(_classes(config), None) or _auto_classes()[0]


def can_be_built(config: PretrainedConfig) -> bool:
    """Tell whether transformers, or the model's own code, has a model of text for it."""
    return next(_classes(config), None) is not None


def _classes(config: PretrainedConfig) -> Iterator[Any]:
    """Give the classes that can build a model, first that which builds the one that was saved.

    Of Llama 4 and others transformers has the text model as well under the same configuration.
    """
    import transformers

    own_code = getattr(config, "auto_map", None) or {}
    saved = set(getattr(config, "architectures", None) or ())
    kinds = [
        kind
        for kind in _auto_classes()
        if kind.__name__ in own_code or type(config) in kind._model_mapping
    ]
    yield from sorted(kinds, key=lambda kind: not saved & _class_names(kind, config))
    for name in saved:
        # The text model of one that also sees has no place in transformers' lists.
        if name.endswith("ForCausalLM") and hasattr(transformers, name):
            yield getattr(transformers, name)


def _class_names(kind: Any, config: PretrainedConfig) -> set[str]:
    """Give the names of the classes that an automatic one may choose for a configuration."""
    found = kind._model_mapping.get(type(config), ())
    return {each.__name__ for each in (found if isinstance(found, (list, tuple)) else [found])}


def _auto_classes() -> list[Any]:
    import transformers

    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    return [getattr(transformers, name) for name in names if hasattr(transformers, name)]


def find_quantized_weights(
    source: str | Path,
    config: BaseQuantizeConfig,
    model_basename: str | None,
    use_safetensors: bool,
    **kwargs: Any,
) -> WeightFiles:
    """Find the weights under the names that AutoGPTQ looked for, in its order."""
    if model_basename:
        # Model cards give the name with and without what it ends in.
        base_names = [re.sub(r"\.(safetensors|bin|pt)$", "", model_basename)]
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
    there = read_headers(weights)
    model = skeleton(model_config, torch_dtype, trust_remote_code)
    names, values = _names(model, there, weights)
    headers = {names.get(name, name): header for name, header in there.items()}
    headers |= {n: Header(list(v.shape), v.dtype, weights.files[0]) for n, v in values.items()}
    stored = {inside: name for name, inside in names.items()}
    head = output_head(model)
    if head is not None and head in find_packed(headers, config.checkpoint_format):
        untie(model, head)
    layouts = _insert_quant_linears(model, headers, config, stored)
    contiguous = {n for n in layouts if (_settings(config, n, stored) or config).contiguous}
    fill(
        model,
        weights,
        headers,
        layouts,
        torch_dtype=torch_dtype,
        contiguous=contiguous,
        stored=stored,
        values=values,
    )
    model.tie_weights()
    model.eval()
    return model


def skeleton(
    config: PretrainedConfig,
    torch_dtype: torch.dtype = torch.float16,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model with parameters on the meta device and buffers for real."""
    from accelerate import init_empty_weights

    config.__dict__.pop("quantization_config", None)  # transformers would want its own backend
    with init_empty_weights(include_buffers=False):
        kind = auto_class(config)
        if hasattr(kind, "from_config"):
            model: PreTrainedModel = kind.from_config(
                config, dtype=torch_dtype, trust_remote_code=trust_remote_code
            )
        else:
            model = kind._from_config(config, dtype=torch_dtype)
    model.tie_weights()
    return model


def _names(
    model: nn.Module, there: Iterable[str], weights: WeightFiles
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Give the model's names of a checkpoint's tensors, and the values of those to be converted.

    Fused experts that the checkpoint holds one by one are parted first.
    """
    fused = [f"{name}." for name in find_fused(model)]
    owners = set(dict(model.named_modules(remove_duplicate=False)))
    own = set(model.state_dict())

    def is_known(name: str) -> bool:
        owner = name.rpartition(".")[0]
        below_fused = any(name.startswith(parent) for parent in fused) and owner not in owners
        return below_fused or name in own or (name.endswith(".weight") and owner in linears)

    linears = set(find_linears(model))
    names = in_model(model, there, is_known)
    unfuse(model, only=expert_parents(model, names.values()))
    fused, own = [], set(model.state_dict())
    packed = packed_owners(names.values())
    lost = {n for n, m in names.items() if m not in own and m.rpartition(".")[0] not in packed}
    to_convert = convertible(model, lost)
    if not to_convert:
        return names, {}
    values = converted(model, dict(read_tensors(weights, to_convert)))
    return {n: m for n, m in names.items() if n not in to_convert}, values


def _settings(
    config: BaseQuantizeConfig, name: str, stored: Mapping[str, str]
) -> BaseQuantizeConfig | None:
    """Give a linear's settings by its name in the model, or, if no pattern has that, on disk."""
    there = stored.get(f"{name}.qweight", f"{name}.qweight").removesuffix(".qweight")
    by_name = find_pattern(config.dynamic or {}, name) is not None
    return config.settings_for(name if by_name else there)


def _insert_quant_linears(
    model: nn.Module,
    names: Iterable[str],
    config: BaseQuantizeConfig,
    stored: Mapping[str, str],
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
        own = _settings(config, name, stored) or config
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
