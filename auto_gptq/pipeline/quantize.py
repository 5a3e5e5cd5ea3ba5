"""The main loop: block after block, step after step. Read this page first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture
from ..calibration.capture import BlockCall, Captured, capture, capture_head
from ..calibration.examples import Batch, merge_batches
from ..errors import NumericsError
from ..nn_modules.surgery import quantized_from, replace, untie
from ..nn_modules.unfused import calibrating
from ..quantization.config import BaseQuantizeConfig
from ..quantization.solver import SolverOptions
from .block import Feed, Solved, propagate, solve_step
from .journal import Journal, describe_job, restore
from .one_pass import fits_one_pass, reading_groups, solve_in_one_pass
from .placement import execution_device, execution_dtype, placed
from .plan import Plan, make_plan, solver_options
from .progress import Progress
from .report import ModuleReport
from .routing import with_routed_tokens

# Tokens that run through a block at a time: enough to keep the device busy.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    architecture: Architecture,
    config: BaseQuantizeConfig,
    batches: Sequence[Batch],
    *,
    show_progress: bool | None = None,
    work_dir: str | Path | None = None,
) -> list[ModuleReport]:
    """Quantize a model in place: its linears become QuantLinears.

    Each block is solved on what the already quantized blocks before it put out.

    :param work_dir: folder that keeps finished blocks; a run that was ended goes on from there
    :raises NumericsError: naming the module whose weights or inputs hold NaN or infinity
    :raises ConfigError: if ``work_dir`` holds a run of something else
    """
    plan = make_plan(model, architecture, config)
    device = execution_device(model)
    dtype = execution_dtype(next(plan.blocks.parameters()).dtype, device)
    batches = merge_batches(batches, _TOKENS_AT_ONCE.get(device.type, 2048))
    journal = work_dir and Journal.open(work_dir, describe_job(model, config, batches, dtype))
    captured = _capture(model, plan, batches, device, dtype)
    report: list[ModuleReport] = []
    with (
        calibrating(model, config.expert_share, len(batches)),
        Progress(len(plan.settings), show_progress) as progress,
        ThreadPoolExecutor(len(batches), thread_name_prefix="auto_gptq-pass") as threads,
    ):
        run = _Run(threads, {})
        before: list[BlockCall] = []
        for i, block in enumerate(plan.blocks):
            name = f"{plan.prefix}.{i}"
            feed = _feed(captured, i, device, dtype)
            for call, earlier in zip(feed.calls, before, strict=bool(before)):
                call.carry_on(earlier)
            before = feed.calls
            stored = journal.read(i, device) if journal else None
            done: list[Solved] = []
            with placed(block, device, dtype):
                try:
                    options = plan.options(name, i)
                    for solved in run.solve(block, plan.steps[i], feed, options, stored):
                        done.append(solved)
                        report.append(_entry(name, i, solved))
                        progress.module_done(report[-1])
                except NumericsError as error:
                    raise NumericsError(f"{name}: {error}") from error
            report[len(report) - len(done) :] = with_routed_tokens(
                report[len(report) - len(done) :], name, block, config.expert_share
            )
            if journal and stored is None:
                journal.write(i, done)
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


@dataclass
class _Run:
    """What stays the same from block to block."""

    threads: ThreadPoolExecutor
    # Which linears read one tensor, by class of block and names of linears.
    readings: dict[tuple[type[nn.Module], tuple[str, ...]], list[list[str]]]

    def solve(
        self,
        block: nn.Module,
        steps: list[list[str]],
        feed: Feed,
        options: Mapping[str, SolverOptions],  # by the names of the linears
        stored: Sequence[Solved] | None,  # by an earlier run
    ) -> Iterator[Solved]:
        """Solve a block, and replace the hidden states by its outputs."""
        if stored is not None:
            restore(block, stored)
            propagate(block, feed)
            yield from stored
            return
        linears = {name: block.get_submodule(name) for step in steps for name in step}
        if len(steps) > 1 and fits_one_pass(linears, feed):
            kind = (type(block), tuple(linears))
            if kind not in self.readings:
                first = feed.hidden[0], feed.calls[0]
                self.readings[kind] = reading_groups(block, linears, *first)
            groups = self.readings[kind]
            if sum(map(len, groups)) == len(linears):  # all were reached, and none twice
                yield from solve_in_one_pass(block, linears, groups, feed, options, self.threads)
                return
        for step in steps:
            of_step = {name: linears[name] for name in step}
            yield from solve_step(block, of_step, feed, options)
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
