"""Will vLLM and SGLang take a checkpoint?  Their rules, read off vLLM 0.33 and SGLang 0.5.23.

Both look at the settings in config.json and at the names and shapes of the tensors. Neither reads
zero points, and vLLM reads no ``g_idx``, so what these hold must be what the settings say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..errors import MissingFileError
from ..formats.gptq import has_middle_zeros, trivial_g_idx
from ..quantization.config import BaseQuantizeConfig
from .fill import some
from .layouts import find_packed
from .reader import Header, WeightFiles, find_weights, read_headers, read_tensors

SERVERS = ("vLLM", "SGLang")
_REQUIRED = ("bits", "group_size", "desc_act", "sym")
_GROUP_SIZES = (-1, 32, 64, 128)
# What both run as one linear, by the name they give it.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Linears that servers build packed unless told otherwise.
_IN_BLOCKS = {*(part for parts in _FUSED.values() for part in parts), "o_proj", "down_proj"}


@dataclass(frozen=True)
class Verdict:
    """What one server makes of a checkpoint."""

    server: str
    kernels: tuple[str, ...]  # by which it would run; empty if it refuses
    refusals: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.refusals

    def __str__(self) -> str:
        if self:
            return f"{self.server} runs it with {', '.join(self.kernels)}"
        return f"{self.server} does not take it: {'; '.join(self.refusals)}"


@dataclass(frozen=True)
class PackedLinear:
    """What decides about one linear."""

    name: str
    settings: BaseQuantizeConfig
    in_features: int
    out_features: int  # of all linears that run as one with it
    trivial_order: bool  # what g_idx holds
    middle_zeros: bool  # what qzeros hold


def check_servable(
    checkpoint: str | Path, model_basename: str | None = None, **hub_arguments: Any
) -> dict[str, Verdict]:
    """Tell, per server, whether it will take a checkpoint and with which kernels.

    :param checkpoint: folder or Hub id
    :param model_basename: name of the weights' file without extension, if it is an unusual one
    :raises MissingFileError: if there is no ``config.json``, or no weights
    """
    path = hub.find_file(checkpoint, "config.json", **hub_arguments)
    if path is None:
        raise MissingFileError(f"{checkpoint} holds no config.json, which servers start from.")
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("model", "pytorch_model") if model_basename is None else (model_basename,)
    extensions = (".safetensors", ".bin")
    return judge(config, find_weights(checkpoint, names, extensions, **hub_arguments))


def judge(config: Mapping[str, Any], weights: WeightFiles) -> dict[str, Verdict]:
    """Tell, per server, what it makes of the content of a ``config.json`` and its weights."""
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") != "gptq":
        reason = "config.json has no quantization_config with quant_method 'gptq'"
        return {server: Verdict(server, (), (reason,)) for server in SERVERS}
    settings = BaseQuantizeConfig.from_quant_config(stored)
    headers = read_headers(weights)
    linears = _packed_linears(weights, headers, settings)
    whole = [*_about_settings(stored, settings, linears), *_about_parts(linears, headers, settings)]
    told = {"SGLang": [] if whole else _about_dense(headers, settings)}
    return {s: _verdict(s, [*whole, *told.get(s, [])], linears) for s in SERVERS}


def _verdict(server: str, whole: Sequence[str], linears: Sequence[PackedLinear]) -> Verdict:
    refusals = list(whole)
    for rule in RULES:
        if server in rule.servers:
            found = {x.name: rule.refusal(x) for x in linears}
            reasons = {name: reason for name, reason in found.items() if reason is not None}
            if reasons:
                refusals.append(f"{next(iter(reasons.values()))} ({some(reasons, most=1)})")
    kernels: tuple[str, ...] = () if refusals else _kernels(server, linears)
    return Verdict(server, kernels, tuple(refusals))


@dataclass(frozen=True)
class Rule:
    """What a server refuses about a linear, by saying why; None if nothing."""

    servers: tuple[str, ...]
    refusal: Callable[[PackedLinear], str | None]


def _bits(x: PackedLinear) -> str | None:
    if x.settings.bits in (4, 8) and x.settings.sym:
        return None
    return f"bits={x.settings.bits} with sym={x.settings.sym}; it must be 4 or 8, symmetric"


def _group_size(x: PackedLinear) -> str | None:
    size = x.settings.group_size
    return None if size in _GROUP_SIZES else f"group_size={size}; it must be one of {_GROUP_SIZES}"


def _whole_groups(x: PackedLinear) -> str | None:
    size = x.settings.group_size
    if size == -1 or x.in_features % size == 0:
        return None
    return f"{x.in_features} inputs are no multiple of group_size={size}"


def _no_act_order(x: PackedLinear) -> str | None:
    if not x.settings.desc_act or x.settings.group_size == -1:
        return None
    return "desc_act=True with groups; quantize with static_groups=True to keep the order's gain"


def _order_as_said(x: PackedLinear) -> str | None:
    if x.trivial_order or (x.settings.desc_act and x.settings.group_size != -1):
        return None
    return "g_idx is not in order, but the settings do not say desc_act=True; outputs are wrong"


def _zeros_as_said(x: PackedLinear) -> str | None:
    return None if x.middle_zeros else "zero points are not the middle code; outputs are wrong"


def _whole_tiles(x: PackedLinear) -> str | None:
    if x.in_features % 128 == 0 and x.out_features % 64 == 0:
        return None
    return (
        f"{x.in_features} inputs and {x.out_features} outputs; they must be multiples of 128 and 64"
    )


RULES = (
    Rule(SERVERS, _bits),
    Rule(SERVERS, _group_size),
    Rule(SERVERS, _whole_groups),
    Rule(("vLLM",), _no_act_order),
    Rule(SERVERS, _order_as_said),
    Rule(SERVERS, _zeros_as_said),
    Rule(("SGLang",), _whole_tiles),
)


def _kernels(server: str, linears: Iterable[PackedLinear]) -> tuple[str, ...]:
    """Give the kernels that a server chooses, as it says it by its rules."""
    if server == "SGLang":
        return ("Marlin",)
    names = {
        "Machete on Hopper, Marlin elsewhere" if _fits_machete(x) else "Marlin" for x in linears
    }
    return tuple(sorted(names))


def _fits_machete(x: PackedLinear) -> bool:
    whole = x.in_features % 64 == 0 and x.out_features % 128 == 0
    return whole and x.settings.group_size != 32 and ".experts." not in x.name


def _about_settings(
    stored: Mapping[str, Any], settings: BaseQuantizeConfig, linears: Sequence[PackedLinear]
) -> list[str]:
    """Give what both servers refuse about the settings as a whole."""
    if settings.checkpoint_format == "marlin":
        return ["it is in Marlin's own layout; save it with checkpoint_format='gptq'"]
    missing = [key for key in _REQUIRED if stored.get(key) is None]
    if missing:
        return [f"quantization_config lacks {', '.join(missing)}"]
    if not linears:
        return ["it holds no packed weights"]
    head = [x.name for x in linears if x.name.rpartition(".")[2] == "lm_head"]
    return (
        [f"{head[0]} is packed, but lm_head is not true"] if head and not settings.lm_head else []
    )


def _about_parts(
    linears: Sequence[PackedLinear], headers: Mapping[str, Header], settings: BaseQuantizeConfig
) -> list[str]:
    """Give what both servers refuse about linears that they run as one."""
    packed = {x.name: x for x in linears}
    present = {*packed, *(name.rpartition(".")[0] for name in headers if name.endswith(".weight"))}
    together: dict[str, list[str]] = {}
    for name in sorted(present):
        fused = _fused_name(name)
        if fused is not None:
            together.setdefault(fused, []).append(name)
    found = []
    for fused, parts in together.items():
        own = [packed.get(part) for part in parts]
        kinds = {None if x is None else _kind(x.settings) for x in own}
        as_one = settings.settings_for(fused)
        if len(kinds) > 1:
            found.append(f"{some(parts, most=3)} run as one and must be packed alike")
        elif None not in kinds and kinds != {None if as_one is None else _kind(as_one)}:
            found.append(f"`dynamic` means {parts[0]}, but does not match {fused}, as it is called")
    return found[:1]


def _about_dense(headers: Mapping[str, Header], settings: BaseQuantizeConfig) -> list[str]:
    """Give what SGLang, which does not look at the tensors' names, has to be told."""
    names = (name.rpartition(".")[0] for name in headers if name.endswith(".weight"))
    inside = [name for name in names if name.rpartition(".")[2] in _IN_BLOCKS]
    untold = [name for name in inside if settings.settings_for(name) is not None]
    return [f"dense, but `dynamic` does not leave out {some(untold, most=1)}"] if untold else []


def _fused_name(name: str) -> str | None:
    experts = re.match(r"(.*\.experts)\.\d+\.", name)
    if experts:
        return experts[1]
    parent, _, leaf = name.rpartition(".")
    return next((f"{parent}.{fused}" for fused, parts in _FUSED.items() if leaf in parts), None)


def _kind(settings: BaseQuantizeConfig) -> tuple[int, int, bool]:
    return settings.bits, settings.group_size, settings.sym


def _packed_linears(
    weights: WeightFiles, headers: Mapping[str, Header], settings: BaseQuantizeConfig
) -> list[PackedLinear]:
    names = [
        n
        for n, kind in find_packed(headers, settings.checkpoint_format).items()
        if kind != "marlin"
    ]
    wanted = {f"{name}.{leaf}" for name in names for leaf in ("g_idx", "qzeros")}
    own = {name: settings.settings_for(name) or settings for name in names}
    rows = {n: headers[f"{n}.qweight"].shape[0] * 32 // own[n].bits for n in names}
    trivial, middle = dict.fromkeys(names, True), dict.fromkeys(names, True)
    for full, tensor in read_tensors(weights, wanted):
        name, _, leaf = full.rpartition(".")
        if leaf == "g_idx":
            order = trivial_g_idx(rows[name], own[name].group_size)
            trivial[name] = torch.equal(tensor.to(torch.int32), order)
        elif own[name].sym:
            middle[name] = has_middle_zeros(tensor, own[name].bits, settings.checkpoint_format)
    outputs = {name: headers[f"{name}.qweight"].shape[1] for name in names}
    fused = {name: name if ".experts." in name else _fused_name(name) or name for name in names}
    together: Counter[str] = Counter()
    for name in names:
        together[fused[name]] += outputs[name]
    return [
        PackedLinear(n, own[n], rows[n], together[fused[n]], trivial[n], middle[n]) for n in names
    ]
