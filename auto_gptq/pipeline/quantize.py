"""The main loop: block after block, step after step. Read this page first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..architectures import Architecture
from ..calibration.capture import BlockCall, Captured, capture, capture_head
from ..calibration.examples import Batch, merge_batches
from ..errors import ModuleShapeError, NumericsError, UnsupportedModelError
from ..formats.gptq import ZERO_OFFSET
from ..formats.grid import GridRule
from ..formats.marlin import find_obstacle
from ..nn_modules.qlinear.linear import check_shape
from ..nn_modules.surgery import features, find_linears, output_head, quantized_from, replace, untie
from ..quantization.config import CHECKPOINT_FORMAT, BaseQuantizeConfig
from ..quantization.dynamic import find_pattern
from ..quantization.solver import SolverOptions
from .block import Feed, Solved, propagate, solve_step
from .one_pass import fits_one_pass, reading_groups, solve_in_one_pass
from .placement import execution_device, execution_dtype, placed
from .progress import Progress
from .report import ModuleReport

logger = logging.getLogger(__name__)

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
    settings: dict[str, BaseQuantizeConfig]  # by full name, of each linear to quantize
    head: str | None  # full name of the output head, if it is to be quantized

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
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks at `{architecture.blocks}`."
        )
    steps: list[list[list[str]]] = []
    settings: dict[str, BaseQuantizeConfig] = {}
    for i, block in enumerate(blocks):
        linears = find_linears(block)
        steps.append([])
        for step in architecture.step_names(config.true_sequential):
            wanted = []
            for name in (name for name in step if name in linears):
                own = _checked(f"{architecture.blocks}.{i}.{name}", linears[name], config)
                if own is not None:
                    settings[f"{architecture.blocks}.{i}.{name}"] = own
                    wanted.append(name)
            if wanted:
                steps[-1].append(wanted)
    if not settings:
        raise UnsupportedModelError(
            f"No block of {type(model).__name__} has any of the linears {architecture.steps}"
            + (" that `dynamic` does not skip." if config.dynamic else ".")
        )
    head = _head_name(model, architecture, config)
    if head is not None:
        settings[head] = _checked(head, model.get_submodule(head), config) or config
    _warn_of_idle_patterns(model, config)
    return Plan(blocks, architecture.blocks, steps, settings, head)


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
    device = execution_device(model)
    dtype = execution_dtype(next(plan.blocks.parameters()).dtype, device)
    batches = merge_batches(batches, _TOKENS_AT_ONCE[device.type == "cuda"])
    captured = _capture(model, plan, batches, device, dtype)
    readings: Readings = {}
    report: list[ModuleReport] = []
    with Progress(len(plan.settings), show_progress) as progress:
        for i, block in enumerate(plan.blocks):
            name = f"{plan.prefix}.{i}"
            feed = _feed(captured, i, device, dtype)
            done: list[Solved] = []
            with placed(block, device, dtype):
                try:
                    options = plan.options(name, i)
                    for solved in _solve_block(block, plan.steps[i], feed, options, readings):
                        done.append(solved)
                        report.append(_entry(name, i, solved))
                        progress.module_done(report[-1])
                except NumericsError as error:
                    raise NumericsError(f"{name}: {error}") from error
            _pack(block, name, done, plan)
        if plan.head is not None:
            captured.hidden = feed.hidden
            solved = _quantize_head(model, plan, batches, captured, dtype)
            report.append(_entry("", len(plan.blocks), solved))
            progress.module_done(report[-1])
    return report


def _quantize_head(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    captured: Captured,
    dtype: torch.dtype,
) -> Solved:
    """Quantize the output head on what the quantized blocks, and the norm after them, put out."""
    name = plan.head or ""
    device = captured.hidden[0].device
    untie(model, name)
    head = model.get_submodule(name)
    with placed(model, device, dtype, without=plan.blocks):
        capture_head(model, list(plan.blocks), batches, captured, head)
        feed = Feed(captured.hidden, [BlockCall((), {}) for _ in batches], captured.keep)
        options = {name: solver_options(plan.settings[name])}
        (solved,) = solve_step(head, {name: head}, feed, options)
    _pack(model, "", [solved], plan)
    return solved


def _solve_block(
    block: nn.Module,
    steps: list[list[str]],
    feed: Feed,
    options: Mapping[str, SolverOptions],  # by the names of the linears
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


def _pack(parent: nn.Module, parent_name: str, done: Sequence[Solved], plan: Plan) -> None:
    """Put QuantLinears in place, where the dense linears lay."""
    packed = []
    for solved in done:
        linear = parent.get_submodule(solved.name)
        settings = plan.settings[_joined(parent_name, solved.name)]
        home = next(linear.parameters()).device
        layer = quantized_from(
            linear,
            solved.solution,
            settings.bits,
            settings.group_size,
            settings.checkpoint_format,
        )
        packed.append((solved.name, layer.to(home)))
    replace(parent, packed)


def _joined(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _entry(block_name: str, index: int, solved: Solved) -> ModuleReport:
    return ModuleReport(
        name=_joined(block_name, solved.name),
        block=index,
        error=solved.error,
        damp_percent=solved.solution.damp_percent,
        tokens=solved.tokens,
        seconds=solved.seconds,
    )
