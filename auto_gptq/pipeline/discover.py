"""Propose the row of a model that has none: its blocks, and their linears in the order of running.

One batch of a few tokens is run up to the first block, then through one block of each kind, with a
hook on every linear.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..architectures import Architecture, find, matching
from ..architectures.find import model_types
from ..calibration.capture import BlockCall, trace
from ..errors import AutoGPTQError, UnsupportedModelError
from ..nn_modules.surgery import is_linear, output_head
from ..nn_modules.unfused import calibrating
from .one_pass import reading_groups

logger = logging.getLogger(__name__)

BlockList = nn.ModuleList | nn.Sequential
# Parts of a model that do not make text.
_OTHER_SENSES = re.compile(
    r"vision|visual|image|img|audio|speech|video|pixel|patch|vit|vqmodel|vqvae|depth_decoder|talker"
    r"|mtp|nextn|resampler|connector|projector|adapter|qformer|tower",
)
_ENCODER = re.compile(r"encoder(?!_decoder)")  # what a decoder attends to; alone it may make text
# Linears that choose experts: small, and a wrong choice costs more than they weigh.
_ROUTERS = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate|.*_router)(?:$|\.)")
_TOKENS = 8
# What a model that cannot be run here raises: on the meta device, with inputs of its own, ...
_CANNOT_RUN = (AutoGPTQError, RuntimeError, TypeError, ValueError, KeyError, AttributeError)


def find_or_discover(model: nn.Module, model_type: str) -> Architecture:
    """Give the row of a model type if it suits the model, else what is discovered.

    It suits if the model has all linears that it names, and no others. Code of a model's own may
    have taken the name of a type whose blocks it has changed.

    :raises UnsupportedModelError: if there is neither
    """
    if model_type in model_types():
        row = find(model_type)
        blocks = dict(model.named_modules()).get(row.blocks)
        names = {name for block in blocks or () for name in _linears(block)}
        named = [matching(name, names) for name in row.linear_names()]
        others = names - {name for found in named for name in found}
        if all(named) and all(_ROUTERS.search(name) for name in others):
            return row
    return discover(model)


@torch.no_grad()
def discover(model: nn.Module) -> Architecture:
    """Propose a model's row.

    :raises UnsupportedModelError: if it has no list of blocks with linears
    """
    prefix, blocks = find_blocks(model)
    steps: list[tuple[str, ...]] = []
    for kind in _kinds(model, blocks):
        steps = _merged(steps, kind)
    return Architecture(
        block_classes={_model_type(model): type(blocks[0]).__name__},
        blocks=prefix,
        around=_around(model, prefix),
        steps=tuple(" ".join(step) for step in steps),
        head=output_head(model) or "lm_head",
    )


def find_blocks(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """Find the list of decoder blocks: of the lists with linears, the largest that makes text.

    :raises UnsupportedModelError: if there is none
    """
    lists: dict[str, BlockList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if not inside and isinstance(module, BlockList) and _are_blocks(module):
            lists[name] = module
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} isn't supported yet: it has no list of repeated blocks with "
            "linear layers in them, so there is nothing that GPTQ could quantize."
        )
    names = list(lists)
    for others in (_OTHER_SENSES, _ENCODER):
        names = [name for name in names if not others.search(name)] or names
    chosen = max(names, key=lambda name: _weight(lists[name]))
    return chosen, list(lists[chosen])


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    """Give every linear below a module by its dotted name, packed ones too."""
    named = module.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) or is_linear(m)}


def _are_blocks(modules: BlockList) -> bool:
    """Tell a list of blocks from one of experts or of the layers of an MLP."""
    children = list(modules)
    with_linears = [child for child in children if _linears(child)]
    if any(name == "" for child in children for name in _linears(child)):
        return False  # linears themselves
    return 2 * len(with_linears) >= len(children) > 0


def _weight(modules: BlockList) -> int:
    return sum(p.numel() for linear in _linears(modules).values() for p in linear.parameters())


def _kinds(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[tuple[str, ...]]]:
    """Give the steps of one block of each kind."""
    kinds: dict[tuple[Any, ...], int] = {}
    for i, block in enumerate(blocks):
        kinds.setdefault((type(block), tuple(_linears(block))), i)
    captured = None
    try:
        captured = trace(model, blocks, _TOKENS)
    except _CANNOT_RUN as error:
        logger.warning(
            "%s cannot be run on %d tokens (%s); the order of its linears is that in which they "
            "are defined.",
            type(model).__name__,
            _TOKENS,
            error,
        )
    result = []
    for i in kinds.values():
        linears = {n: m for n, m in _linears(blocks[i]).items() if not _ROUTERS.search(n)}
        groups = [[name] for name in linears]
        if captured is not None:
            try:
                with calibrating(blocks[i], 1e9, batches=1):
                    call: BlockCall = captured.calls[i][0]
                    groups = reading_groups(blocks[i], linears, captured.hidden[0], call)
            except _CANNOT_RUN as error:
                logger.warning(
                    "%s cannot be run alone (%s); the order of its linears is that in which they "
                    "are defined.",
                    type(blocks[i]).__name__,
                    error,
                )
        result.append(starred(groups))
    return result


def starred(groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Write ``*`` for the numbers of experts, which make one step."""
    steps = [tuple(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in g)) for g in groups]
    return list(dict.fromkeys(steps))


def _merged(
    steps: list[tuple[str, ...]], others: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Put the steps of another kind of block among those known, in an order that suits both."""
    result = list(steps)
    place = 0
    for step in others:
        known = {name for have in result for name in have}
        new = tuple(name for name in step if name not in known)
        if new:
            result.insert(place, new)
            place += 1
        else:
            place = 1 + max(i for i, have in enumerate(result) if set(have) & set(step))
    return result


def _around(model: nn.Module, prefix: str) -> tuple[str, ...]:
    """Give what lies beside the list of blocks."""
    parent, _, last = prefix.rpartition(".")
    beside = model.get_submodule(parent).named_children()
    dot = f"{parent}." if parent else ""
    return tuple(
        f"{dot}{name}"
        for name, child in beside
        if name != last and any(True for _ in child.parameters())
    )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
