"""The main loop: block after block, step after step. Read this page first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..architectures import Architecture
from ..calibration.capture import Captured, capture
from ..calibration.examples import Batch, merge_batches
from ..errors import ModuleShapeError, NumericsError, UnsupportedModelError
from ..formats.gptq import ZERO_OFFSET
from ..formats.grid import GridRule
from ..formats.marlin import find_obstacle
from ..nn_modules.qlinear.linear import check_shape
from ..nn_modules.surgery import features, find_linears, quantized_from, replace
from ..quantization.config import CHECKPOINT_FORMAT, BaseQuantizeConfig
from ..quantization.solver import SolverOptions
from .block import Feed, Solved, propagate, solve_step
from .one_pass import fits_one_pass, reading_groups, solve_in_one_pass
from .placement import execution_device, execution_dtype, placed
from .progress import Progress
from .report import ModuleReport

# Tokens that run through a block at a time on a CPU and on a GPU: enough to keep it busy.
_TOKENS_AT_ONCE = (2048, 16384)

# Which linears read one tensor, in the order of running, by class of block and names of linears.
Readings = dict[tuple[type[nn.Module], tuple[str, ...]], list[list[str]]]


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
            if config.checkpoint_format == CHECKPOINT_FORMAT.MARLIN:
                _check_marlin(full_name, linears[name], config)
        steps.append([step for step in present if step])
    plan = Plan(blocks, architecture.blocks, steps)
    if not plan.module_count:
        raise UnsupportedModelError(
            f"No block of {type(model).__name__} has any of the linears {architecture.steps}."
        )
    return plan


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
    rule = GridRule(config.bits, config.sym, lowest_zero=ZERO_OFFSET[config.checkpoint_format])
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
    batches = merge_batches(batches, _TOKENS_AT_ONCE[device.type == "cuda"])
    captured = _capture(model, plan, batches, device, dtype)
    readings: Readings = {}
    report: list[ModuleReport] = []
    with Progress(plan.module_count, show_progress) as progress:
        for i, block in enumerate(plan.blocks):
            name = f"{plan.prefix}.{i}"
            feed = _feed(captured, i, device, dtype)
            done: list[Solved] = []
            with placed(block, device, dtype):
                try:
                    for solved in _solve_block(block, plan.steps[i], feed, options, readings):
                        done.append(solved)
                        report.append(_entry(name, i, solved))
                        progress.module_done(report[-1])
                except NumericsError as error:
                    raise NumericsError(f"{name}: {error}") from error
            _pack(block, done, config)
    return report


def _solve_block(
    block: nn.Module,
    steps: list[list[str]],
    feed: Feed,
    options: SolverOptions,
    readings: Readings,
) -> Iterator[Solved]:
    """Solve a block, and replace the hidden states by its outputs."""
    linears = {name: block.get_submodule(name) for step in steps for name in step}
    if len(steps) > 1 and fits_one_pass(linears, feed):
        kind = (type(block), tuple(linears))
        if kind not in readings:
            readings[kind] = reading_groups(block, linears, feed.hidden[0], feed.calls[0])
        groups = readings[kind]
        if sum(map(len, groups)) == len(linears):  # all were reached, and none twice
            yield from solve_in_one_pass(block, linears, groups, feed, options)
            return
    for step in steps:
        yield from solve_step(block, {name: linears[name] for name in step}, feed, options)
    propagate(block, feed)


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
