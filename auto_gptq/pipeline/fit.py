"""Settings for linears that the user's do not suit, written down where every reader looks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..architectures import Architecture
from ..errors import ModuleShapeError
from ..formats.packing import CODES_PER_STREAM
from ..nn_modules.surgery import features
from ..quantization.config import BaseQuantizeConfig
from ..quantization.dynamic import OVERRIDE, SKIP, find_pattern
from .plan import block_linears

logger = logging.getLogger(__name__)

_MOST_SHOWN = 8
# What differs from the settings; None: the linear stays dense.
Choice = dict[str, Any] | None


def fit_settings(
    model: nn.Module, architecture: Architecture, config: BaseQuantizeConfig
) -> BaseQuantizeConfig:
    """Give settings whose ``dynamic`` says what becomes of linears of an odd shape.

    A linear that a pattern of the user's rules is left to it. Everything chosen is logged.

    :raises ModuleShapeError: (a ValueError) if every linear has fewer inputs than a group
    """
    blocks = model.get_submodule(architecture.blocks)
    names: list[str] = []
    choices: dict[str, Choice] = {}
    inputs: dict[str, int] = {}
    for block_name, linears in block_linears(blocks.children(), architecture):
        wanted = [name for step in architecture.steps_of(linears) for name in step]
        inputs |= {f"{block_name}.{name}": features(linears[name])[0] for name in wanted}
        chosen: dict[str, Choice] = {}
        for name in wanted:
            if find_pattern(config.dynamic or {}, f"{block_name}.{name}") is None:
                choice = suit(*features(linears[name]), config.group_size)
                if choice != {}:
                    chosen[name] = choice
        dense = {_list_of(name) for name, choice in chosen.items() if choice is None}
        skipped = {n for n in wanted if config.settings_for(f"{block_name}.{n}") is None}
        dense |= {_list_of(name) for name in skipped}
        # Servers hold a layer's experts in one tensor: all of them are packed, or none.
        chosen |= {n: None for n in wanted if n not in skipped and _list_of(n) in dense - {""}}
        choices |= {f"{block_name}.{name}": choice for name, choice in chosen.items()}
        names += [f"{block_name}.{name}" for name in wanted]
    _refuse_misfit(inputs, config)
    _tell_of_short_groups({n: k for n, k in inputs.items() if n not in choices}, config)
    if not choices:
        return config
    _tell(choices, config)
    # The user's patterns come last: they rule other linears.
    return replace(config, dynamic=_patterns(names, choices) | (config.dynamic or {}))


def suit(in_features: int, out_features: int, group_size: int) -> Choice:
    """Give what has to differ for a shape: nothing, one group, or None to stay dense.

    Words hold 32 inputs or outputs. Where the group size does not divide the inputs the last group
    is short, as AutoGPTQ made it.
    """
    if in_features % CODES_PER_STREAM or out_features % CODES_PER_STREAM:
        return None
    return {} if group_size <= in_features else {"group_size": -1}


def _list_of(name: str) -> str:
    """Give the name of the list that a linear is in a member of: its experts; "" if of none."""
    found = re.match(r"(.*?)\.\d+(?:\.|$)", name)
    return found[1] if found else ""


def _patterns(names: Iterable[str], choices: Mapping[str, Choice]) -> dict[str, dict[str, Any]]:
    """Write choices as patterns, one for all blocks and experts where these are alike."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name)), []).append(name)
    patterns: dict[str, dict[str, Any]] = {}
    for kind, members in kinds.items():
        distinct = [choices.get(members[0], {})]
        alike = all(choices.get(name, {}) == distinct[0] for name in members)
        for name in members[:1] if alike else members:
            choice = choices.get(name, {})
            if choice != {}:
                sign = SKIP if choice is None else OVERRIDE
                patterns[f"{sign}{kind if alike else re.escape(name)}$"] = choice or {}
    return patterns


def _tell(choices: Mapping[str, Choice], config: BaseQuantizeConfig) -> None:
    dense = [name for name, choice in choices.items() if choice is None]
    if dense:
        logger.warning(
            "%d linears stay in full precision, because their inputs or outputs, or those of an "
            "expert beside them, are no multiples of %d: %s",
            len(dense),
            CODES_PER_STREAM,
            _some(dense),
        )
    whole = [name for name, choice in choices.items() if choice]
    if whole:
        logger.warning(
            "group_size=%d is more than the inputs of %d linears, which get one group: %s",
            config.group_size,
            len(whole),
            _some(whole),
        )


def _refuse_misfit(inputs: Mapping[str, int], config: BaseQuantizeConfig) -> None:
    """Refuse a group size that was meant for another model."""
    if inputs and max(inputs.values()) < config.group_size:
        name, most = max(inputs.items(), key=lambda item: item[1])
        raise ModuleShapeError(
            f"group_size={config.group_size} fits no linear: the one with the most inputs, {name}, "
            f"has {most}. Choose a group_size of at most {most}, or -1 for one group per output."
        )


def _tell_of_short_groups(inputs: Mapping[str, int], config: BaseQuantizeConfig) -> None:
    size = config.group_size
    short = [name for name, count in inputs.items() if size != -1 and count % size]
    if short:
        logger.warning(
            "group_size=%d does not divide the inputs of %d linears, whose last group is short. "
            "AutoGPTQ, GPTQModel and transformers read that; vLLM and SGLang want a size that "
            "divides them, such as 64 or 32: %s",
            size,
            len(short),
            _some(short),
        )


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
