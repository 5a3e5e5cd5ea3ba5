"""AutoGPTQ's helper functions, over the stages that do their work now."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _old_names
from ..checkpoint.reader import find_weights
from ..errors import ConfigError, UnsupportedModelError
from ..nn_modules.qlinear.linear import QuantLinear
from ..nn_modules.qlinear.select import dynamically_import_QuantLinear
from ..nn_modules.surgery import features, replace
from . import load
from ._const import SUPPORTED_MODELS
from .place import place

logger = logging.getLogger(__name__)

__getattr__ = _old_names.getter(__name__)


def get_device(obj: Tensor | nn.Module) -> torch.device:
    """Give the device of a tensor, or of the first parameter or buffer of a module."""
    if isinstance(obj, Tensor):
        return obj.device
    first = next(obj.parameters(), None)
    return (next(obj.buffers()) if first is None else first).device


def move_to_device(obj: Any, device: torch.device | str | int) -> Any:
    """Move a tensor or module; None stays None."""
    return obj if obj is None else obj.to(device)


def nested_move_to_device(v: Any, device: torch.device | str | int) -> Any:
    """Move the tensors in nested lists and tuples."""
    if isinstance(v, Tensor):
        return v.to(device)
    if isinstance(v, (list, tuple)):
        return type(v)(nested_move_to_device(item, device) for item in v)
    return v


def find_layers(
    module: nn.Module, layers: Iterable[type] | None = None, name: str = ""
) -> dict[str, nn.Module]:
    """Give the linears and convolutions below ``module``, or what is of the given types, by name.

    Quantized layers are only found if their type is asked for, though they are Linears too.

    :param name: what the names start with
    """
    found = {}
    types = (nn.Linear, nn.Conv2d) if layers is None else tuple(layers)
    wants_packed = any(issubclass(kind, QuantLinear) for kind in types)
    for below, child in module.named_modules():
        is_wanted = isinstance(child, types)
        if layers is None:  # by name, not by class: importing transformers takes seconds
            is_wanted = is_wanted or type(child).__name__ == "Conv1D"
        if is_wanted and (wants_packed or not isinstance(child, QuantLinear)):
            found[".".join(part for part in (name, below) if part)] = child
    return found


def get_module_by_name_prefix(model: nn.Module, module_name: str) -> nn.Module | None:
    """Give the first module whose dotted name starts with the given one."""
    named = model.named_modules()
    return next((module for name, module in named if name.startswith(module_name)), None)


def get_module_by_name_suffix(model: nn.Module, module_name: str) -> nn.Module | None:
    """Give the first module whose dotted name ends with the given one."""
    named = model.named_modules()
    return next((module for name, module in named if name.endswith(module_name)), None)


def recurse_getattr(obj: Any, attr: str) -> Any:
    """Give what a dotted name leads to."""
    return functools.reduce(getattr, attr.split("."), obj)


def recurse_setattr(module: Any, name: str, value: Any) -> None:
    """Set what a dotted name leads to."""
    parent, _, leaf = name.rpartition(".")
    setattr(recurse_getattr(module, parent) if parent else module, leaf, value)


def make_quant(
    module: nn.Module,
    names: Iterable[str],
    bits: int,
    group_size: int,
    name: str = "",
    use_triton: bool = False,
    use_marlin: bool = False,
    disable_exllama: bool | None = None,
    disable_exllamav2: bool = False,
    use_qigen: bool = False,
    use_cuda_fp16: bool = True,
    desc_act: bool = False,
    trainable: bool = False,
    use_tritonv2: bool = False,
) -> None:
    """Put empty QuantLinears in the place of the submodules of these names.

    :param names: dotted names, each starting with ``name`` if that is given
    """
    kind = dynamically_import_QuantLinear(
        use_triton,
        desc_act,
        group_size,
        bits,
        disable_exllama,
        disable_exllamav2,
        use_qigen,
        use_marlin,
        use_tritonv2,
    )
    wanted = set(names)
    layers = []
    for full_name, linear in find_layers(module, (nn.Module,), name).items():
        if full_name not in wanted or isinstance(linear, QuantLinear):
            continue
        layer = kind(
            bits,
            group_size,
            *features(linear),
            getattr(linear, "bias", None) is not None,
            use_cuda_fp16=use_cuda_fp16,
            trainable=trainable,
            weight_dtype=linear.weight.dtype,
        )
        layer.device = get_device(linear)
        layer.to(layer.device)
        layers.append((full_name.removeprefix(f"{name}.") if name else full_name, layer))
    replace(module, layers)


def pack_model(
    model: nn.Module,
    quantizers: Mapping[str, Sequence[Any]],
    bits: int,
    group_size: int,
    use_triton: bool = False,
    use_cuda_fp16: bool = True,
    desc_act: bool = False,
    warmup_triton: bool = False,
    force_layer_back_to_cpu: bool = False,
    use_marlin: bool = False,
    use_tritonv2: bool = False,
) -> None:
    """Pack the fake-quantized linears of a model in place.

    :param quantizers: dotted name → (anything, scales ``[N, G]``, zeros ``[N, G]``, g_idx ``[K]``)
    :param force_layer_back_to_cpu: leave the packed layers on the CPU
    :raises ConfigError: (a ValueError) if a name is no linear of the model
    """
    linears = find_layers(model)
    unknown = [name for name in quantizers if name not in linears]
    if unknown:
        raise ConfigError(
            f"{len(unknown)} of {len(quantizers)} names to pack are no linears of "
            f"{type(model).__name__}, {unknown[0]} for one. Give names as named_modules() does."
        )
    make_quant(
        model,
        quantizers,
        bits,
        group_size,
        use_triton=use_triton,
        use_marlin=use_marlin,
        disable_exllama=False,
        disable_exllamav2=True,
        use_cuda_fp16=use_cuda_fp16,
        desc_act=desc_act,
        use_tritonv2=use_tritonv2,
    )
    for name, (_, scales, zeros, g_idx) in quantizers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        home = get_device(layer)
        layer.pack(linears[name], scales, zeros, g_idx)
        layer.to("cpu" if force_layer_back_to_cpu else home)


def autogptq_post_init(
    model: nn.Module, use_act_order: bool, max_input_length: int | None = None
) -> nn.Module:
    """Give the model back: kernels need no buffers that would have to be made first."""
    return model


def exllama_set_max_input_length(model: Any, max_input_length: int) -> Any:
    """Give the model back: no kernel has an upper limit for its input.

    :raises ConfigError: (a ValueError) where AutoGPTQ raised it too: without act-order, or
        without a quantized layer
    """
    if not model.quantize_config.desc_act:
        raise ConfigError(
            "exllama_set_max_input_length is for models with desc_act=True; this one has "
            "desc_act=False and needs no call."
        )
    if not any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} has no quantized layer; nothing to set.")
    return model


def simple_dispatch_model(model: Any, device_map: dict[str, Any]) -> Any:
    """Place the parts of a model as a map says, and give it back."""
    place(model, None, device_map, None)
    return model


def make_sure_no_tensor_in_meta_device(
    model: nn.Module,
    use_triton: bool,
    desc_act: bool,
    group_size: int,
    bits: int,
    disable_exllama: bool | None,
    disable_exllamav2: bool,
    use_marlin: bool = False,
    use_tritonv2: bool = False,
) -> None:
    """Give quantized layers whose bias is not in the checkpoint a bias of zeros."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.bias is not None and module.bias.is_meta:
            zeros = torch.zeros(module.out_features, dtype=torch.float16, device="cpu")
            module.register_buffer("bias", zeros)


def check_supported(model_type: str, supported: Iterable[str], config: Any = None) -> None:
    """Refuse a model type that is not in a list and that transformers cannot build either.

    :param config: the model's configuration; None to go by the list alone
    :raises UnsupportedModelError: (a TypeError)
    """
    if model_type not in supported and not (config is not None and load.can_be_built(config)):
        raise UnsupportedModelError(
            f"{model_type} isn't supported yet: the installed transformers has no language model "
            f"of that type. Known model types: {sorted(supported)}, and every other one that "
            "transformers can build. For code of the model's own pass trust_remote_code=True."
        )


def check_and_get_model_type(
    model_dir: str | Path, trust_remote_code: bool = False, **kwargs: Any
) -> str:
    """Read the model type of a folder or Hub repository.

    :raises UnsupportedModelError: (a TypeError) if it is neither in ``SUPPORTED_MODELS`` nor one
        that transformers can build
    """
    config = load.load_config(model_dir, trust_remote_code, **kwargs)
    model_type = str(config.model_type)
    check_supported(model_type, SUPPORTED_MODELS, config)
    return model_type


def get_checkpoints(
    model_name_or_path: str | Path,
    extensions: Sequence[str],
    possible_model_basenames: Sequence[str],
    **cached_file_kwargs: Any,
) -> tuple[bool, str, str]:
    """Find weights; give whether they are sharded, their (first) file and its base name.

    :raises MissingFileError: (a FileNotFoundError) listing all names tried
    """
    found = find_weights(
        model_name_or_path, possible_model_basenames, extensions, **cached_file_kwargs
    )
    return len(found.files) > 1, str(found.files[0]), found.base_name
