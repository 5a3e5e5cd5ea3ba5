"""The main loop: block after block, step after step. Read this page first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..architectures import Architecture
from ..calibration.capture import BlockCall, Captured, capture, capture_head
from ..calibration.examples import Batch, merge_batches
from ..errors import NumericsError
from ..nn_modules import surgery
from ..nn_modules.surgery import find_linears, quantized_from, untie
from ..nn_modules.unfused import calibrating
from ..quantization.config import BaseQuantizeConfig
from ..quantization.solver import SolverOptions
from .block import Feed, Solved, propagate, solve_step
from .exact import Exact, find_writers
from .journal import Journal, describe_job, restore
from .one_pass import fits_one_pass, reading_groups, solve_in_one_pass
from .placement import execution_device, execution_dtype, placed
from .plan import Plan, make_plan, solver_options
from .progress import Progress
from .report import ModuleReport
from .routing import with_routed_tokens
from .tuning import tune_block

logger = logging.getLogger(__name__)

# Tokens that run through a block at a time: enough to keep the device busy.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}
_TUNED_AT_ONCE = 4096  # fewer: each batch is one step
# Tokens that also run through the full-precision blocks, to see how far the quantized model drifts:
# enough for a regression, and little time beside the Hessians of a usual calibration.
_EXACT_TOKENS = 65536


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
    at_once = _TOKENS_AT_ONCE.get(device.type, 2048)
    at_once = min(at_once, _TUNED_AT_ONCE) if config.tuning_epochs else at_once
    _warn_of_few_tokens(plan, batches)
    batches = merge_batches(batches, at_once)
    journal = work_dir and Journal.open(work_dir, describe_job(model, config, batches, dtype))
    captured = _capture(model, plan, batches, device, dtype)
    report: list[ModuleReport] = []
    with (
        calibrating(model, config.expert_share, len(batches)),
        Progress(len(plan.settings), show_progress) as progress,
        ThreadPoolExecutor(2 * len(batches), thread_name_prefix="auto_gptq-pass") as threads,
    ):
        exact = _first(captured.hidden, _EXACT_TOKENS) if plan.looks_at_exact() else []
        run = _Run(threads, {}, {}, exact, config)
        before: list[BlockCall] = []
        for i, block in enumerate(plan.blocks):
            name = f"{plan.prefix}.{i}"
            feed = _feed(captured, i, device, dtype)
            run.exact[:] = [x.to(device, dtype) for x in run.exact]
            feed.exact = run.exact
            for call, earlier in zip(feed.calls, before, strict=bool(before)):
                call.carry_on(earlier)
            before = feed.calls
            stored = journal.read(i, device) if journal else None
            done: list[Solved] = []
            with placed(block, device, dtype):
                try:
                    options = plan.options(name, i)
                    for solved in run.finish(block, plan.steps[i], feed, options, stored):
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


def _warn_of_few_tokens(plan: Plan, batches: Sequence[Batch]) -> None:
    linears = find_linears(plan.blocks[0])
    inputs = max((surgery.features(linear)[0] for linear in linears.values()), default=0)
    tokens = sum(batch.tokens for batch in batches)
    if tokens < 2 * inputs:
        logger.warning(
            "The examples hold %d tokens for linears of up to %d inputs. Fewer than twice as many "
            "tokens as inputs say little about how these go together: use more or longer examples.",
            tokens,
            inputs,
        )


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
    writers: dict[tuple[type[nn.Module], tuple[str, ...]], list[str]]  # to the residual stream
    # The full-precision model's hidden states before the block, of the first batches; replaced by
    # those after it.  Empty if nothing is corrected towards them.
    exact: list[Tensor]
    config: BaseQuantizeConfig

    def finish(
        self,
        block: nn.Module,
        steps: list[list[str]],
        feed: Feed,
        options: Mapping[str, SolverOptions],  # by the names of the linears
        stored: Sequence[Solved] | None,  # by an earlier run
    ) -> Iterator[Solved]:
        """Find a block's integers, and replace the hidden states by its outputs."""
        if stored is not None:
            if feed.exact:
                propagate(block, feed.of_exact())
            restore(block, stored)
            propagate(block, feed)
            yield from stored
        elif self.config.tuning_epochs:
            before = replace(feed, hidden=[*feed.hidden])
            done = list(self.solve(block, steps, feed, options))
            bits = {name: option.rule.bits for name, option in options.items()}
            epochs = self.config.tuning_epochs
            yield from tune_block(block, done, bits, before, feed.exact, epochs)
            feed.hidden[:] = before.hidden
            propagate(block, feed)
        else:
            yield from self.solve(block, steps, feed, options)

    def solve(
        self,
        block: nn.Module,
        steps: list[list[str]],
        feed: Feed,
        options: Mapping[str, SolverOptions],  # by the names of the linears
    ) -> Iterator[Solved]:
        """Solve a block, and replace the hidden states by its outputs."""
        linears = {name: block.get_submodule(name) for step in steps for name in step}
        exact = self._exact(block, linears, feed) if feed.exact else None
        if len(steps) > 1 and fits_one_pass(linears, feed):
            kind = (type(block), tuple(linears))
            if kind not in self.readings:
                first = feed.hidden[0], feed.calls[0]
                self.readings[kind] = reading_groups(block, linears, *first)
            groups = self.readings[kind]
            if sum(map(len, groups)) == len(linears):  # all were reached, and none twice
                yield from solve_in_one_pass(
                    block, linears, groups, feed, options, self.threads, exact
                )
                return
        for step in steps:
            of_step = {name: linears[name] for name in step}
            yield from solve_step(block, of_step, feed, options, exact)
        propagate(block, feed)
        if exact is not None:
            with exact.in_place():
                propagate(block, feed.of_exact())

    def _exact(self, block: nn.Module, linears: Mapping[str, nn.Module], feed: Feed) -> Exact:
        everyone = find_linears(block)
        kind = (type(block), tuple(everyone))
        if kind not in self.writers:
            self.writers[kind] = find_writers(block, everyone, feed.exact[0], feed.calls[0])
        return Exact(block, linears, self.writers[kind])


def _first(hidden: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Give the batches that hold so many tokens, one at least."""
    lengths = [x.shape[:-1].numel() for x in hidden]
    return [x for i, x in enumerate(hidden) if i == 0 or sum(lengths[: i + 1]) <= tokens]


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
    surgery.replace(parent, packed)


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
