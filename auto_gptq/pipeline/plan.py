"""What will be quantized and how, decided and checked before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from ..architectures import Architecture, matching
from ..errors import ModuleShapeError, UnsupportedModelError
from ..formats.gptq import ZERO_OFFSET
from ..formats.grid import GridRule
from ..formats.marlin import find_obstacle
from ..nn_modules.qlinear.linear import check_shape
from ..nn_modules.surgery import features, find_linears, output_head
from ..quantization.config import CHECKPOINT_FORMAT, BaseQuantizeConfig
from ..quantization.dynamic import find_pattern
from ..quantization.solver import SolverOptions
from .discover import BlockList

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be quantized, decided and checked before anything is changed."""

    blocks: BlockList
    prefix: str  # dotted name of the list of blocks
    steps: list[list[list[str]]]  # per block, per step: names relative to the block
    settings: dict[str, BaseQuantizeConfig]  # by full name, of each linear to quantize
    head: str | None  # full name of the output head, if it is to be quantized

    def looks_at_exact(self) -> bool:
        """Tell whether the full-precision model must run beside the quantized one."""
        settings = self.settings.values()
        return any(own.correction or own.tuning_epochs or own.scale_epochs for own in settings)

    def options(self, block_name: str, index: int) -> dict[str, SolverOptions]:
        """Give the options of a block's linears by their relative names."""
        names = [name for step in self.steps[index] for name in step]
        return {name: solver_options(self.settings[f"{block_name}.{name}"]) for name in names}


def make_plan(model: nn.Module, architecture: Architecture, config: BaseQuantizeConfig) -> Plan:
    """Find the linears to quantize and check that each can be.

    :raises UnsupportedModelError: if the model does not have the blocks its row names
    :raises ModuleShapeError: if a linear cannot be packed at these settings
    """
    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, BlockList) or not len(blocks):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks at `{architecture.blocks}`."
        )
    plan = Plan(blocks, architecture.blocks, [], {}, None)
    for name, linears in block_linears(blocks, architecture):
        plan.steps.append([])
        for step in architecture.steps_of(linears, config.true_sequential):
            settings = {
                linear: _checked(f"{name}.{linear}", linears[linear], config) for linear in step
            }
            own = {linear: one for linear, one in settings.items() if one is not None}
            plan.settings.update({f"{name}.{linear}": one for linear, one in own.items()})
            if own:
                plan.steps[-1].append(list(own))
    if not plan.settings:
        raise UnsupportedModelError(
            f"No block of {type(model).__name__} has any of the linears {architecture.steps}"
            + (" that `dynamic` does not skip." if config.dynamic else ".")
        )
    _warn_of_absent_names(model, architecture, plan.steps, config)
    head = _head_name(model, architecture, config)
    if head is not None:
        plan.settings[head] = _checked(head, model.get_submodule(head), config) or config
    _warn_of_idle_patterns(model, config)
    return replace(plan, head=head)


def block_linears(
    blocks: Iterable[nn.Module], architecture: Architecture
) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Give each block's full name and its linears; what blocks share belongs to the first."""
    done: set[nn.Module] = set()
    for i, block in enumerate(blocks):
        linears = {name: m for name, m in find_linears(block).items() if m not in done}
        done.update(linears.values())
        yield f"{architecture.blocks}.{i}", linears


def _warn_of_absent_names(
    model: nn.Module,
    architecture: Architecture,
    steps: list[list[list[str]]],
    config: BaseQuantizeConfig,
) -> None:
    found = {name for block in steps for step in block for name in step}
    absent = [name for name in architecture.linear_names() if not matching(name, found)]
    if absent and not config.dynamic:
        logger.warning(
            "No block of %s has %s; what takes their place stays in full precision.",
            type(model).__name__,
            ", ".join(absent),
        )


def _checked(name: str, linear: nn.Module, config: BaseQuantizeConfig) -> BaseQuantizeConfig | None:
    """Give one linear's settings, None if it stays dense."""
    settings = config.settings_for(name)
    if settings is not None:
        check_shape(name, *features(linear), settings.group_size)
        if settings.checkpoint_format == CHECKPOINT_FORMAT.MARLIN:
            _check_marlin(name, linear, settings)
    return settings


def _head_name(
    model: nn.Module, architecture: Architecture, config: BaseQuantizeConfig
) -> str | None:
    """Give the full name of the output head, None if it is not to be quantized."""
    # The model knows best: transformers 5 renamed the head of gpt_neox.
    head = output_head(model) or architecture.head
    if not config.lm_head or config.settings_for(head) is None:
        return None
    if head not in find_linears(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear `{head}`; quantize it with lm_head=False."
        )
    return head


def _warn_of_idle_patterns(model: nn.Module, config: BaseQuantizeConfig) -> None:
    names = find_linears(model)
    used = {find_pattern(config.dynamic or {}, name) for name in names}
    idle = [pattern for pattern in config.dynamic or {} if pattern not in used]
    if idle:
        logger.warning(
            "No linear is ruled by the patterns %s of `dynamic`. Names are matched from their "
            "start, as in %s, and the first match counts.",
            idle,
            next(iter(names), "no name at all"),
        )


def _check_marlin(name: str, linear: nn.Module, config: BaseQuantizeConfig) -> None:
    """Refuse now what could not be saved as Marlin after hours of work."""
    in_features, out_features = features(linear)
    obstacle = find_obstacle(config.bits, in_features, out_features, config.group_size, config.sym)
    scattered = config.desc_act and not config.static_groups
    if obstacle is None and scattered and config.group_size not in (-1, in_features):
        obstacle = "desc_act without static_groups scatters its groups"
    if obstacle is not None:
        raise ModuleShapeError(
            f"{name} cannot be saved as 'marlin': {obstacle}. "
            "Change that setting, or use checkpoint_format='gptq'."
        )


def solver_options(config: BaseQuantizeConfig) -> SolverOptions:
    """Translate the user's settings."""
    # Only the v1 format cannot hold a zero point of 0.
    rule = GridRule(
        config.bits,
        config.sym,
        lowest_zero=ZERO_OFFSET[config.checkpoint_format],
        signed=config.signed_scales,
    )
    return SolverOptions(
        rule,
        group_size=config.group_size,
        damp_percent=config.damp_percent,
        act_order=config.desc_act,
        static_groups=config.static_groups,
        scale_search=config.scale_search,
        keep_unrounded=config.tuning_epochs > 0,
        correction=config.correction,
    )
