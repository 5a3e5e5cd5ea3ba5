"""From a quantized model to a checkpoint."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..checkpoint.blocks import DiskWeights
from ..checkpoint.layouts import WRITABLE, encode
from ..checkpoint.names import dense_on_disk, on_disk
from ..checkpoint.reader import WeightFiles
from ..checkpoint.safetensors_file import Outgoing
from ..checkpoint.servable import judge
from ..checkpoint.writer import Files, file_pattern, staged, write_weights
from ..errors import ConfigError
from ..formats.gptq import has_middle_zeros, has_zero_zeros
from ..nn_modules.qlinear.linear import QuantLinear
from ..quantization.config import (
    CHECKPOINT_FORMAT,
    ORDERLESS,
    QUANT_METHOD,
    BaseQuantizeConfig,
)
from .carry import Source, carry_files
from .custom_code import carry_code, found_beside
from .legacy_config import with_legacy_keys
from .load import default_base_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def save_checkpoint(
    model: PreTrainedModel,
    config: BaseQuantizeConfig,
    save_dir: str | Path,
    *,
    files: Files,
    safetensors_metadata: dict[str, Any] | None = None,
    checkpoint_format: str | None = None,
    source: Source | None = None,
    disk: DiskWeights | None = None,
) -> None:
    """Write weights, their settings, ``config.json`` and what else the model came with.

    The final names appear only once everything has been written.

    :param checkpoint_format: "gptq", "gptq_v2" or "marlin"; None for what the settings say
    :param source: where the tokenizer's files, and a model's own code, are copied from
    :param disk: where the weights are, if they are not in memory
    :raises ConfigError: if the metadata is not a dict, or the format or size is none
    :raises CheckpointError: naming the layer that the format cannot hold
    """
    folder = Path(save_dir)
    base_name = config.model_file_base_name or default_base_name(config)
    settings = saved_config(config, model, checkpoint_format)
    metadata = _metadata(settings, safetensors_metadata)
    tensors = _tensors(model, settings.checkpoint_format, disk)
    with staged(folder, replaces=file_pattern(base_name, files)) as stage:
        write_weights(tensors, stage, base_name, metadata=metadata, files=files)
        code = set() if source is None else carry_code(source, stage)
        config_text = _model_config(model, settings, code)
        (stage / "config.json").write_text(config_text, encoding="utf-8")
        settings.save_pretrained(stage)
        generation = getattr(model, "generation_config", None)  # own code may not generate
        if generation is not None:
            # Not its save_pretrained: that refuses settings which many published models have.
            (stage / "generation_config.json").write_text(
                generation.to_json_string(), encoding="utf-8"
            )
        if source is not None:
            carry_files(source, stage)
        refused = _refused(stage, files)
    if refused:
        logger.warning("Saved, but not every server will run it. %s.", ". ".join(refused))


def _refused(folder: Path, files: Files) -> list[str]:
    """Give what servers refuse about a folder just written."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written = WeightFiles(sorted(folder.glob(f"*{files.extension}")), "")
    return [str(verdict) for verdict in judge(config, written).values() if not verdict]


def saved_config(
    config: BaseQuantizeConfig, model: nn.Module, checkpoint_format: str | None = None
) -> BaseQuantizeConfig:
    """Give the settings as a reader has to see them.

    With static groups the processing order left no trace in ``g_idx``; saying ``desc_act: true``
    would make vLLM refuse the checkpoint.  Paths of this machine are nobody's business.
    """
    target = checkpoint_format or config.checkpoint_format
    sym = config.sym
    if target == CHECKPOINT_FORMAT.AWQ_GEMM and checkpoint_format is None:
        target, sym = _replacement_of_awq(model)
    if target not in WRITABLE:
        raise ConfigError(f"checkpoint_format is {target!r}; it must be one of {WRITABLE}.")
    ordered = target not in ORDERLESS
    dynamic = None if config.dynamic is None else copy.deepcopy(config.dynamic)
    for override in (dynamic or {}).values():
        if "desc_act" in override or "static_groups" in override:
            own = replace(config, dynamic=None, **override)
            override["desc_act"] = own.desc_act and not own.static_groups and ordered
    return replace(
        config,
        dynamic=dynamic,
        sym=sym,
        desc_act=config.desc_act and not config.static_groups and ordered,
        quant_method=QUANT_METHOD.GPTQ,
        checkpoint_format=target,
        model_name_or_path=None,
        model_file_base_name=None,
    )


def note_packing(model: PreTrainedModel, config: BaseQuantizeConfig) -> None:
    """Say in a model's configuration how it is packed.

    transformers' own ``save_pretrained`` writes what it finds there beside the tensors as they are
    in memory; without, its ``from_pretrained`` would make new weights.
    """
    for layer in _quant_linears(model).values():
        held = replace(saved_config(config, model), checkpoint_format=layer.checkpoint_format)
        model.config.quantization_config = held.to_dict()
        return  # all are alike in that


def _replacement_of_awq(model: nn.Module) -> tuple[str, bool]:
    """Choose the format for a model read from AWQ, which is not written, and say if symmetric."""
    layers = _quant_linears(model).values()
    sym = all(has_middle_zeros(x.qzeros, x.bits, x.checkpoint_format) for x in layers)
    if any(has_zero_zeros(x.qzeros, x.bits, x.checkpoint_format) for x in layers):
        logger.info("Some zero points are 0, which 'gptq' cannot hold; saving as 'gptq_v2'.")
        return CHECKPOINT_FORMAT.GPTQ_V2, sym
    return CHECKPOINT_FORMAT.GPTQ, sym


def _quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def _tensors(
    model: nn.Module, checkpoint_format: str, disk: DiskWeights | None
) -> dict[str, Outgoing]:
    """Give all tensors of a model by their names on disk, tied parameters and modules once."""
    layers = _quant_linears(model)
    names = on_disk(model, layers)
    every = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, Outgoing] = {}
    dense: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = name.rpartition(".")[0]
        if owner in layers:
            if f"{owner}.qweight" == name:  # one buffer stands for all of them
                encoded = _encoded(owner, layers[owner], checkpoint_format, disk)
                tensors |= {f"{names[owner]}.{leaf}": value for leaf, value in encoded.items()}
        elif isinstance(every[owner], QuantLinear):
            continue  # it has another name as well
        elif id(tensor) not in written or not isinstance(tensor, nn.Parameter):
            dense[name] = tensor.detach()
        written.add(id(tensor))
    return tensors | _dense(model, dense, layers, disk)


def _dense(
    model: nn.Module, tensors: dict[str, Tensor], packed: Iterable[str], disk: DiskWeights | None
) -> dict[str, Outgoing]:
    """Give dense tensors by their names on disk."""
    inside = {id(tensor): name for name, tensor in tensors.items()}
    result = {}
    for name, tensor in dense_on_disk(model, tensors, packed).items():
        result[name] = Outgoing.of(tensor)
        if disk is not None and tensor.is_meta:
            if id(tensor) not in inside:
                raise ConfigError(
                    f"{name} is not stored as the model has it. Load the model without "
                    "device_map='disk'."
                )
            result[name] = disk.outgoing(inside[id(tensor)])
    return result


def _encoded(
    name: str, layer: QuantLinear, checkpoint_format: str, disk: DiskWeights | None
) -> dict[str, Outgoing]:
    """Give a layer's tensors; one on disk is read when it is checked, and when it is written."""
    if disk is None:
        return encode(name, layer, checkpoint_format)
    here = torch.device("cpu")
    with disk.loaded(layer, name, here):
        encoded = encode(name, layer, checkpoint_format)

    def made(leaf: str) -> Tensor:
        with disk.loaded(layer, name, here):
            return encode(name, layer, checkpoint_format)[leaf].get()

    return {
        leaf: Outgoing(tensor.dtype, tensor.shape, partial(made, leaf))
        for leaf, tensor in encoded.items()
    }


def _model_config(model: PreTrainedModel, settings: BaseQuantizeConfig, code: set[str]) -> str:
    config = copy.deepcopy(model.config)
    config.quantization_config = settings.to_dict()
    config.architectures = [type(model).__name__]  # as transformers' own save_pretrained does
    written = with_legacy_keys(json.loads(config.to_json_string(use_diff=False)))
    written.pop("_name_or_path", None)  # a path of this machine, if anything
    if code:
        written["auto_map"] = found_beside(written.get("auto_map") or {}, code)
    return json.dumps(written, indent=2, sort_keys=True) + "\n"


def _metadata(config: BaseQuantizeConfig, given: dict[str, Any] | None) -> dict[str, str]:
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"safetensors_metadata is a {type(given).__name__}; it must be a dict.")
    return {str(key): str(value) for key, value in (given or {}).items()} | {
        "format": "pt",
        "auto_gptq_version": __version__,
        "gptq_bits": str(config.bits),
        "gptq_group_size": str(config.group_size),
        "gptq_desc_act": str(config.desc_act),
        "gptq_damp_percent": str(config.damp_percent),
        "gptq_checkpoint_format": config.checkpoint_format,
        "gptq_quant_method": config.quant_method,
    }
