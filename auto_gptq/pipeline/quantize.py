"""The main loop: block after block, step after step. Read this page first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..architectures import Architecture
from ..calibration.capture import Captured, capture
from ..calibration.examples import Batch
from ..errors import NumericsError, UnsupportedModelError
from ..formats.grid import GridRule
from ..nn_modules.qlinear.linear import check_shape
from ..nn_modules.surgery import features, find_linears, quantized_from, replace
from ..quantization.config import BaseQuantizeConfig
from ..quantization.solver import SolverOptions
from .block import Feed, Solved, propagate, solve_step
from .placement import execution_device, execution_dtype, placed
from .progress import Progress
from .report import ModuleReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be quantized, decided and checked before anything is changed."""

    blocks: nn.ModuleList
    prefix: str  # dotted name of the list of blocks
    steps: list[list[list[str]]]  # per block, per step: names relative to the block

    @property
    def module_count(self) -> int:
        return sum(len(names) for block in self.steps for names in block)


def make_plan(model: nn.Module, architecture: Architecture, config: BaseQuantizeConfig) -> Plan:
    """Find the linears to quantize and check that each can be.

    :raises UnsupportedModelError: if the model does not have the blocks its row names
    :raises ModuleShapeError: if a linear cannot be packed at these settings
    """
    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks at `{architecture.blocks}`."
        )
    steps = []
    for i, block in enumerate(blocks):
        linears = find_linears(block)
        present = [
            [name for name in step if name in linears]
            for step in architecture.step_names(config.true_sequential)
        ]
        for name in (name for step in present for name in step):
            full_name = f"{architecture.blocks}.{i}.{name}"
            check_shape(full_name, *features(linears[name]), config.group_size)
        steps.append([step for step in present if step])
    plan = Plan(blocks, architecture.blocks, steps)
    if not plan.module_count:
        raise UnsupportedModelError(
            f"No block of {type(model).__name__} has any of the linears {architecture.steps}."
        )
    found = {name for block in steps for step in block for name in step}
    absent = [name for name in architecture.linear_names() if name not in found]
    if absent:
        logger.warning(
            "No block of %s has %s; what takes their place stays in full precision.",
            type(model).__name__,
            ", ".join(absent),
        )
    return plan


def solver_options(config: BaseQuantizeConfig) -> SolverOptions:
    """Translate the user's settings."""
    # Only the v1 format cannot hold a zero point of 0.
    rule = GridRule(
        config.bits, config.sym, lowest_zero=1 if config.checkpoint_format == "gptq" else 0
    )
    return SolverOptions(
        rule,
        group_size=config.group_size,
        damp_percent=config.damp_percent,
        act_order=config.desc_act,
        static_groups=config.static_groups,
        scale_search=config.scale_search,
    )


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    architecture: Architecture,
    config: BaseQuantizeConfig,
    batches: Sequence[Batch],
    show_progress: bool | None = None,
) -> list[ModuleReport]:
    """Quantize a model in place: its linears become QuantLinears.

    Each block is solved on what the already quantized blocks before it put out.

    :raises NumericsError: naming the module whose weights or inputs hold NaN or infinity
    """
    plan = make_plan(model, architecture, config)
    options = solver_options(config)
    device = execution_device(model)
    dtype = execution_dtype(next(plan.blocks.parameters()).dtype, device)
    captured = _capture(model, plan, batches, device, dtype)
    report: list[ModuleReport] = []
    with Progress(plan.module_count, show_progress) as progress:
        for i, block in enumerate(plan.blocks):
            name = f"{plan.prefix}.{i}"
            feed = _feed(captured, i, device, dtype)
            done: list[Solved] = []
            with placed(block, device, dtype):
                try:
                    for step in plan.steps[i]:
                        linears = {n: block.get_submodule(n) for n in step}
                        for solved in solve_step(block, linears, feed, options):
                            done.append(solved)
                            report.append(_entry(name, i, solved))
                            progress.module_done(report[-1])
                    if i + 1 < len(plan.blocks):
                        propagate(block, feed)
                except NumericsError as error:
                    raise NumericsError(f"{name}: {error}") from error
            _pack(block, done, config)
    return report


def _capture(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype,
) -> Captured:
    """Run the model's entry, with only block 0 beside it on the device."""
    with placed(model, device, dtype, without=plan.blocks), placed(plan.blocks[0], device, dtype):
        return capture(model, list(plan.blocks), batches)


def _feed(captured: Captured, index: int, device: torch.device, dtype: torch.dtype) -> Feed:
    calls = [call.to(device, dtype) for call in captured.calls[index]]
    captured.calls[index] = []  # nobody asks again
    for i, hidden in enumerate(captured.hidden):
        captured.hidden[i] = hidden.to(device, dtype)
    return Feed(captured.hidden, calls, captured.keep)


def _pack(block: nn.Module, done: Sequence[Solved], config: BaseQuantizeConfig) -> None:
    """Put QuantLinears in place, where the dense linears lay."""
    packed = []
    for solved in done:
        linear = block.get_submodule(solved.name)
        home = next(linear.parameters()).device
        layer = quantized_from(
            linear, solved.solution, config.bits, config.group_size, config.checkpoint_format
        )
        packed.append((solved.name, layer.to(home)))
    replace(block, packed)


def _entry(block_name: str, index: int, solved: Solved) -> ModuleReport:
    return ModuleReport(
        name=f"{block_name}.{solved.name}",
        block=index,
        error=solved.error,
        damp_percent=solved.solution.damp_percent,
        tokens=solved.tokens,
        seconds=solved.seconds,
    )
