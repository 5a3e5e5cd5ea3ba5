"""Ready a model that transformers is loading for the packed tensors of its checkpoint.

transformers loads whatever tensor has a place of its (renamed) name in the model. So it is enough
to put QuantLinears there beforehand, and to look at what it has done afterwards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.fill import check_packed, some
from ..checkpoint.layouts import find_packed
from ..checkpoint.reader import Header, WeightFiles, find_weights, read_headers, read_tensors
from ..errors import CheckpointError, UnsupportedModelError
from ..formats.gptq import trivial_g_idx
from ..nn_modules.experts import expert_parents, find_fused, unfuse
from ..nn_modules.qlinear.linear import QuantLinear, check_shape
from ..nn_modules.surgery import (
    empty_quant_linear,
    features,
    find_linears,
    output_head,
    prepare,
    replace,
    untie,
)
from ..nn_modules.unfused import find_unfused
from ..quantization.config import CHECKPOINT_FORMAT, BaseQuantizeConfig

logger = logging.getLogger(__name__)

_FLOATS = ("scales", "bias")


@dataclass
class Skeleton:
    """What is known before the values are read and needed afterwards."""

    layers: dict[str, QuantLinear]  # by name in the checkpoint
    names: dict[str, str]  # in the checkpoint → in the model
    weights: WeightFiles
    headers: dict[str, Header]
    dtypes: dict[str, torch.dtype]  # of the model's parameters
    parted: set[str]  # names of tensors that held the experts that lie apart now


def insert(
    model: Any, settings: BaseQuantizeConfig, checkpoint_files: Iterable[str] | None
) -> Skeleton:
    """Put an empty QuantLinear in the place of each linear that the checkpoint holds packed.

    :param model: a transformers model on the meta device
    :param checkpoint_files: its weights; None to look for them where the configuration points to
    :raises CheckpointError: (a ValueError) if tensors do not fit each other or the model
    """
    weights = _weights(model, checkpoint_files)
    headers = read_headers(weights)
    layouts = find_packed(headers, settings.checkpoint_format)
    _check_layouts(layouts)
    before = set(model.state_dict())
    names = _names_in_model(model, headers, layouts)
    linears = find_linears(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    head = output_head(model)
    if head in names.values():
        untie(model, str(head))
    layers = {
        stored: _empty(linears[name], stored, settings, layouts[stored], headers)
        for stored, name in names.items()
    }
    contiguous = {name for name in layouts if (settings.settings_for(name) or settings).contiguous}
    check_packed(layers, weights, headers, layouts, contiguous=contiguous)
    replace(model, [(names[stored], layer) for stored, layer in layers.items()])
    _mark_initialized(model, [*names.values(), *find_unfused(model)], headers)
    parted = tuple(f"{name}." for name in find_unfused(model))
    gone = {name for name in before - set(model.state_dict()) if name.startswith(parted)}
    return Skeleton(layers, names, weights, headers, dtypes, gone)


def finish(model: Any, skeleton: Skeleton) -> None:
    """Complete and check the layers that transformers has filled.

    :raises CheckpointError: (a ValueError) if a layer's values would make every output wrong
    """
    _check_offloading(skeleton.layers.values())
    rounded: dict[str, tuple[QuantLinear, str]] = {}
    for name, layer in skeleton.layers.items():
        if "g_idx" in layer._non_persistent_buffers_set:  # not in the checkpoint
            layer.g_idx = trivial_g_idx(layer.in_features, layer.group_size, layer.g_idx.device)
        if layer.qweight.is_meta:  # offloaded; accelerate fetches the values for each use
            _correct_offload_index(name, layer, skeleton.headers)
            continue
        layer.g_idx = layer.g_idx.to(torch.int32)  # some tools write int64
        layer.check(name)
        for buffer in _FLOATS:
            header = skeleton.headers.get(f"{name}.{buffer}")
            tensor = getattr(layer, buffer)
            if header is not None and tensor is not None and tensor.dtype != header.dtype:
                rounded[f"{name}.{buffer}"] = layer, buffer
    # transformers 4 casts all floats to the model's dtype, and bfloat16 would round the scales.
    for name, tensor in read_tensors(skeleton.weights, rounded) if rounded else ():
        layer, buffer = rounded[name]
        setattr(layer, buffer, tensor.to(layer.qweight.device))
    _restore_dtypes(model, skeleton.dtypes)
    prepare(model)


def _check_offloading(layers: Iterable[QuantLinear]) -> None:
    hooks = [getattr(layer, "_hf_hook", None) for layer in layers]
    kept = sum(
        getattr(h, "offload", False) and not getattr(h, "offload_buffers", True) for h in hooks
    )
    if kept:
        logger.warning(
            "%d packed layers are offloaded by name only: accelerate leaves their tensors, which "
            "are buffers, on the device. To save memory pass offload_buffers=True as well.",
            kept,
        )


def _correct_offload_index(name: str, layer: Any, headers: Mapping[str, Header]) -> None:
    """Let accelerate read a layer's tensors in their own dtypes.

    transformers 4 notes the model's dtype for all, and int32 words do not survive as float32.
    """
    stored = layer._hf_hook.weights_map  # a dataset that puts a prefix before names
    index = getattr(stored.dataset, "index", {})
    for buffer, _ in layer.named_buffers(recurse=False):
        entry, header = index.get(f"{stored.prefix}{buffer}"), headers.get(f"{name}.{buffer}")
        if entry is not None and header is not None and "dtype" in entry:
            entry["dtype"] = str(header.dtype).removeprefix("torch.")


def _weights(model: Any, checkpoint_files: Iterable[str] | None) -> WeightFiles:
    if checkpoint_files is not None:
        return WeightFiles([Path(file) for file in checkpoint_files], "model")
    source = getattr(model.config, "_name_or_path", "")  # transformers 4 does not say more
    if not source:
        raise UnsupportedModelError(
            "A GPTQ model cannot be loaded from a state_dict; give the folder or Hub id of its "
            "checkpoint."
        )
    revision = getattr(model.config, "_commit_hash", None)
    names = ["model", "pytorch_model"]
    return find_weights(source, names, [".safetensors", ".bin"], revision=revision)


def _check_layouts(layouts: Mapping[str, str]) -> None:
    if not layouts:
        raise CheckpointError(
            "The model's config.json says that it is quantized with GPTQ, but the checkpoint "
            "holds no packed weights (`*.qweight`). If it is a full-precision model, remove "
            "`quantization_config` from its config.json."
        )
    if CHECKPOINT_FORMAT.MARLIN in layouts.values():
        raise CheckpointError(
            "The checkpoint is in Marlin's layout, which transformers cannot load. Load it with "
            "AutoGPTQForCausalLM.from_quantized(), and save it with checkpoint_format='gptq'."
        )


def _names_in_model(
    model: Any, headers: Mapping[str, Header], packed: Iterable[str]
) -> dict[str, str]:
    """Give, for each packed linear of the checkpoint, its name in the model.

    Fused experts that the checkpoint holds one by one are parted first.

    :raises CheckpointError: naming those that are no linears there
    """
    fused = find_fused(model)
    rename = _renaming(model, [*find_linears(model), *fused])
    owners = {name.rpartition(".")[0] for name in headers} if fused else set(packed)
    renamed = {name: rename(name) for name in owners}
    if fused:
        inside = {f"{name}.weight" for name in renamed.values()}
        unfuse(model, only=expert_parents(model, inside))
    linears = find_linears(model)
    names = {name: renamed[name] for name in packed}
    lost = [n for n, inside in names.items() if inside not in linears and not _is_beside(model, n)]
    if lost:
        raise CheckpointError(
            f"The checkpoint holds packed weights for {some(lost)}, which are no linear layers of "
            f"{type(model).__name__}."
        )
    return {name: inside for name, inside in names.items() if inside in linears}


def _is_beside(model: Any, name: str) -> bool:
    """Tell whether a name leads out of a base model that is loaded alone, as the head's does."""
    first = name.partition(".")[0]
    return first != model.base_model_prefix and not hasattr(model, first)


class _Below(dict[str, bool]):
    """Knows every name of a tensor below its modules, as transformers asks a dict for it."""

    def get(self, name: str, default: Any = None) -> Any:
        parts = name.split(".")
        return any(".".join(parts[:n]) in self for n in range(1, len(parts))) or default


def _renaming(model: Any, modules: Iterable[str]) -> Callable[[str], str]:
    """Make the function from a linear's name in the checkpoint to that in the model.

    :param modules: names of linears, and of what will have linears inside
    """
    known, prefix = _Below(dict.fromkeys(modules, True)), model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 renames nothing in language models but the prefix

        def prefixed(name: str) -> str:
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            return next((each for each in candidates if known.get(f"{each}.weight")), name)

        return prefixed
    conversions = get_model_conversion_mapping(model)
    # Copied: they note which of them were used, for saving.
    renamings = [deepcopy(each) for each in conversions if isinstance(each, WeightRenaming)]

    def rename(name: str) -> str:
        key, _ = rename_source_key(f"{name}.weight", renamings, [], prefix, known)
        return str(key).removesuffix(".weight")

    return rename


def without_parted(conversions: Iterable[Any], parted: Iterable[str]) -> list[Any]:
    """Leave out the rules that would merge experts which stay apart.

    One expert left dense beside packed ones would be merged into a tensor that is no more.
    """
    return [rule for rule in conversions if not (_merges(rule) and _makes(rule, parted))]


def _merges(rule: Any) -> bool:
    return bool(getattr(rule, "operations", None))


def _makes(rule: Any, names: Iterable[str]) -> bool:
    ends = [re.sub(r"[\\^$]", "", target) for target in rule.target_patterns]
    return any(name.endswith(end) for name in names for end in ends)


def _empty(
    linear: nn.Module,
    name: str,
    settings: BaseQuantizeConfig,
    layout: str,
    headers: Mapping[str, Header],
) -> QuantLinear:
    """Build a layer whose tensors have the dtypes of the checkpoint, so that none is rounded."""
    own = settings.settings_for(name) or settings
    check_shape(name, *features(linear), own.group_size)
    with torch.device("meta"):
        layer = empty_quant_linear(linear, own.bits, own.group_size, layout)
        for buffer in _FLOATS:
            header = headers.get(f"{name}.{buffer}")
            tensor = getattr(layer, buffer)
            if header is not None and header.dtype is not None and tensor is not None:
                setattr(layer, buffer, tensor.to(header.dtype))
    if f"{name}.g_idx" not in headers:
        trivial = trivial_g_idx(layer.in_features, layer.group_size, "cpu")
        layer.register_buffer("g_idx", trivial, persistent=False)
    return layer


def _mark_initialized(
    model: nn.Module, layers: Iterable[str], headers: Mapping[str, Header]
) -> None:
    """Keep transformers from initializing weights that are derived, or that are no more.

    A GPT-2 MLP or a Mamba mixer changes the weight of a linear inside it, Qwen 3 Omni's router
    those of the experts beside it, so owners are marked as well, unless they have parameters that
    the checkpoint lacks.

    :param layers: names of packed linears, and of modules whose experts were parted
    """
    for name in layers:
        parent = name.rpartition(".")[0]
        owner = model.get_submodule(parent)
        marked: list[Any] = [model.get_submodule(name)]
        own = {f"{parent}.{parameter}" for parameter in owner._parameters}
        if own <= headers.keys() and not owner._buffers:
            marked.append(owner)
        for module in marked:
            module._is_hf_initialized = True


def _restore_dtypes(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast what transformers before 5.20 left in the checkpoint's dtype because it was renamed.

    An offloaded parameter is on the meta device; accelerate casts what it fetches to its dtype.
    """
    from transformers.quantizers.base import HfQuantizer

    if hasattr(HfQuantizer, "get_new_dtype") or not hasattr(model, "_get_dtype_plan"):
        return
    kept = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(model.dtype)]
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        is_kept = any(re.search(pattern, name) for pattern in kept)
        if parameter.dtype != wanted and not is_kept:
            parameter.data = parameter.data.to(wanted)
