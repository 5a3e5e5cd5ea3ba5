"""The main loop: block after block, step after step. Read this page first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture
from ..calibration.activations import Activations
from ..calibration.capture import BlockCall, Captured, capture, capture_head
from ..calibration.examples import Batch, merge_batches
from ..checkpoint.blocks import DiskWeights
from ..errors import ConfigError, NumericsError, QuantizedStateError
from ..nn_modules import surgery
from ..nn_modules.qlinear.linear import QuantLinear, dense_weight
from ..nn_modules.surgery import find_linears, quantized_from, untie
from ..nn_modules.unfused import calibrating
from ..quantization.config import BaseQuantizeConfig
from ..quantization.solver import SolverOptions
from .block import Feed, Solved, propagate, solve_step
from .exact import Exact, Writer, find_writers
from .journal import Finished, Journal, describe_job, restore
from .one_pass import fits_one_pass, reading_groups, solve_in_one_pass
from .outlook import say_what_is_needed, warn_of_few_tokens
from .placement import Workplace, execution_device, execution_dtype
from .plan import Plan, make_plan, solver_options
from .progress import Progress
from .ranks import Ranks
from .report import ModuleReport, summary, write_report
from .routing import with_routed_tokens
from .scales import tune_scales
from .tuning import tune_block

logger = logging.getLogger(__name__)

# Tokens that run through a block at a time: enough to keep the device busy.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}
_TUNED_AT_ONCE = 4096  # fewer: each batch is one step
# Tokens that also run through the full-precision blocks, to see how far the quantized model drifts:
# enough for a regression, and little time beside the Hessians of a usual calibration.
_EXACT_TOKENS = 65536


_Kind = tuple[type[nn.Module], tuple[str, ...]]  # class of block, names of its linears


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    architecture: Architecture,
    config: BaseQuantizeConfig,
    batches: Sequence[Batch],
    *,
    show_progress: bool | None = None,
    work_dir: str | Path | None = None,
    disk: DiskWeights | None = None,
) -> list[ModuleReport]:
    """Quantize a model in place: its linears become QuantLinears.

    Each block is solved on what the already quantized blocks before it put out.

    :param work_dir: folder that keeps finished blocks; a run that was ended goes on from there
    :param disk: where the weights of a model on the meta device lie; needs a ``work_dir``
    :raises NumericsError: naming the module whose weights or inputs hold NaN or infinity
    :raises ConfigError: if ``work_dir`` holds a run of something else, or is missing
    :raises StorageError: (an OSError) if the disk is full
    """
    if disk is not None and work_dir is None:
        raise ConfigError(
            "The model's weights stay on disk, and so must the quantized ones: "
            "call quantize(..., work_dir=folder)."
        )
    if disk is not None and config.scale_epochs:
        raise ConfigError(
            "scale_epochs tunes the whole model at once, so its weights cannot stay on disk. "
            "Set it to 0, or load the model into memory."
        )
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise QuantizedStateError(
            "Some blocks are quantized already, by a run that was ended. Load the model again; "
            "with the same work_dir the run goes on where it was."
        )
    ranks = Ranks.current()
    plan = make_plan(model, architecture, config)
    warn_of_few_tokens(plan, batches)
    with ranks.device(execution_device(model)) as device:
        dtype = execution_dtype(next(plan.blocks.parameters()).dtype, device)
        # Two batches at least: see Ranks.parts.
        half = -(-sum(batch.input_ids.numel() for batch in batches) // 2)
        at_once = min(half, _TOKENS_AT_ONCE.get(device.type, 2048))
        at_once = min(at_once, _TUNED_AT_ONCE) if config.tuning_epochs else at_once
        batches = merge_batches(batches, at_once)
        journal = None
        if work_dir is not None:
            job = describe_job(model, config, batches, dtype, disk.head if disk else None)
            journal = ranks.agree(lambda: Journal.open(work_dir, job))
        own = ranks.share(batches)
        run = _Run(model, config, plan, Workplace(device, dtype, disk), ranks, journal, own)
        if ranks.is_first:
            say_what_is_needed(model, plan, batches, device, dtype)
        try:
            report = run.all_blocks(show_progress if ranks.is_first else False)
        except KeyboardInterrupt:
            logger.warning("%s", run.what_is_kept())
            raise
    if ranks.is_first:
        logger.info("Quantized.\n%s", summary(report, config.damp_percent))
        if journal is not None:
            write_report(report, journal.folder, config.damp_percent)
    return report


@dataclass
class _Run:
    """One call of :func:`quantize_model`."""

    model: nn.Module
    config: BaseQuantizeConfig
    plan: Plan
    workplace: Workplace
    ranks: Ranks
    journal: Journal | None
    batches: list[Batch]  # of this rank
    # The full-precision model's hidden states before the block, of the first batches; replaced by
    # those after it.  Empty if nothing is corrected towards them.
    exact: Activations = field(default_factory=Activations.none)
    # Which linears read one tensor, by class of block and names of linears.
    readings: dict[_Kind, list[list[str]]] = field(default_factory=dict)
    writers: dict[_Kind, dict[str, Writer]] = field(default_factory=dict)  # to the residual stream

    def all_blocks(self, show_progress: bool | None) -> list[ModuleReport]:
        """Quantize the blocks one after another, and the output head if that is asked for."""
        device, dtype = self.workplace.device, self.workplace.dtype
        tokens = sum(batch.tokens for batch in self.batches)
        blocks = len(self.plan.blocks) + (self.plan.head is not None)
        folder = None if self.journal is None else self.journal.folder
        rows = sum(batch.input_ids.numel() for batch in self.batches)
        hidden = Activations(device, dtype, rows, folder=folder)
        report: list[ModuleReport] = []
        try:
            captured = self._capture(hidden)
            if self.plan.looks_at_exact():
                self.exact = hidden.first(_EXACT_TOKENS // self.ranks.count)
            with (
                calibrating(self.model, self.config.expert_share, len(self.batches)),
                Progress(blocks, tokens, device, show_progress) as progress,
                ThreadPoolExecutor(2 * len(self.batches), "auto_gptq-pass") as threads,
            ):
                before: list[BlockCall] = []
                for i, block in enumerate(self.plan.blocks):
                    calls = [call.to(device, dtype) for call in captured.calls[i]]
                    captured.calls[i] = []  # nobody asks again
                    for call, earlier in zip(calls, before, strict=bool(before)):
                        call.carry_on(earlier)
                    before = calls
                    feed = Feed(hidden, calls, captured.keep, self.ranks, self.exact)
                    report += self._one_block(i, block, feed, threads, progress)
                    progress.block_done()
                if self.config.scale_epochs:
                    self._tune_scales(captured.outputs)
                if self.plan.head is not None:
                    report += self._head(captured)
                    progress.block_done()
        finally:
            hidden.close()
            self.exact.close()
        return report

    def _one_block(
        self,
        index: int,
        block: nn.Module,
        feed: Feed,
        threads: ThreadPoolExecutor,
        progress: Progress,
    ) -> list[ModuleReport]:
        """Quantize one block, unless an earlier run has, and put its QuantLinears in place."""
        name = f"{self.plan.prefix}.{index}"
        home = next(block.parameters()).device
        stored = self._stored(index, block, name)
        with self.workplace.holds(block, name):
            try:
                if stored is not None:
                    propagate(block, feed.of_exact())
                    restore(block, stored.layers)
                    propagate(block, feed)
                    layers, report = stored.layers, stored.report
                else:
                    done, report = [], []
                    for solved in self._tuned(index, block, feed, threads):
                        done.append(solved)
                        report.append(_entry(name, index, solved))
                        progress.module_done(report[-1])
                    report = with_routed_tokens(report, name, block, self.config.expert_share)
                    layers = self._packed(block, name, done)
            except NumericsError as error:
                raise NumericsError(f"{name}: {error}") from error
            surgery.replace(block, layers.items())
        self._keep(index, name, layers, report if stored is None else None, home)
        return report

    def _tuned(
        self, index: int, block: nn.Module, feed: Feed, threads: ThreadPoolExecutor
    ) -> Iterator[Solved]:
        """Find a block's integers, and replace the hidden states by its outputs."""
        epochs = self.config.tuning_epochs
        if not epochs:
            yield from self._solve(index, block, feed, threads)
            return
        before = replace(feed, hidden=feed.hidden.copy())
        done = list(self._solve(index, block, feed, threads))
        options = self.plan.options(f"{self.plan.prefix}.{index}", index)
        bits = {name: option.rule.bits for name, option in options.items()}
        if self.ranks.is_first:
            done = tune_block(block, done, bits, before, [*feed.exact], epochs)
        for solved in done:
            told = replace(solved, solution=self.ranks.tell(solved.solution))
            weight = dense_weight(block.get_submodule(solved.name))
            weight.copy_(told.solution.dequantize().to(weight.dtype))
            yield told
        for i, hidden in enumerate(before.hidden):
            feed.hidden[i] = hidden
        before.hidden.close()
        propagate(block, feed)

    def _tune_scales(self, outputs: int) -> None:
        """Let the first rank tune all scales, and the others take them from it."""
        device, epochs = self.workplace.device, self.config.scale_epochs
        if self.ranks.is_first:
            blocks = list(self.plan.blocks)
            tune_scales(self.model, blocks, self.batches, self.exact, outputs, device, epochs)
        for layer in self.plan.blocks.modules():
            if isinstance(layer, QuantLinear):
                self.ranks.tell_tensor(layer.scales, device)

    def _exact(self, block: nn.Module, linears: Mapping[str, nn.Module], feed: Feed) -> Exact:
        everyone = find_linears(block)
        kind = (type(block), tuple(everyone))
        if kind not in self.writers:
            self.writers[kind] = self.ranks.agree(
                lambda: find_writers(block, everyone, feed.exact[0], feed.calls[0])
            )
        return Exact(block, linears, self.writers[kind])

    def _solve(
        self, index: int, block: nn.Module, feed: Feed, threads: ThreadPoolExecutor
    ) -> Iterator[Solved]:
        """Solve a block, and replace the hidden states by its outputs."""
        steps = self.plan.steps[index]
        options = self.plan.options(f"{self.plan.prefix}.{index}", index)
        linears = {name: block.get_submodule(name) for step in steps for name in step}
        exact = self._exact(block, linears, feed) if len(feed.exact) else None
        if len(steps) > 1 and self.ranks.all(fits_one_pass(linears, feed)):
            groups = self._reading_groups(block, linears, feed)
            if sum(map(len, groups)) == len(linears):  # all were reached, and none twice
                yield from solve_in_one_pass(block, linears, groups, feed, options, threads, exact)
                return
        for step in steps:
            of_step = {name: linears[name] for name in step}
            yield from solve_step(block, of_step, feed, options, exact)
        propagate(block, feed)
        if exact is not None:
            with exact.in_place():
                propagate(block, feed.of_exact())

    def _reading_groups(
        self, block: nn.Module, linears: Mapping[str, nn.Module], feed: Feed
    ) -> list[list[str]]:
        kind = (type(block), tuple(linears))
        if kind not in self.readings:
            self.readings[kind] = self.ranks.agree(
                lambda: reading_groups(block, linears, feed.hidden[0], feed.calls[0])
            )
        return self.readings[kind]

    def _head(self, captured: Captured) -> list[ModuleReport]:
        """Quantize the output head on what the quantized blocks, and the norm after them, give."""
        name, index = self.plan.head or "", len(self.plan.blocks)
        untie(self.model, name)
        head = self.model.get_submodule(name)
        home = next(head.parameters()).device
        stored = self._stored(index, self.model, "")
        if stored is not None:
            layers, report = stored.layers, stored.report
        else:
            with self.workplace.holds(self.model, "", without=self.plan.blocks):
                capture_head(self.model, list(self.plan.blocks), self.batches, captured, head)
                calls = [BlockCall((), {}) for _ in self.batches]
                feed = Feed(captured.hidden, calls, captured.keep, self.ranks)
                options: dict[str, SolverOptions] = {name: solver_options(self.plan.settings[name])}
                done = list(solve_step(head, {name: head}, feed, options))
                layers = self._packed(self.model, "", done)
            report = [_entry("", index, solved) for solved in done]
        surgery.replace(self.model, layers.items())
        self._keep(index, "", layers, report if stored is None else None, home)
        return report

    def _capture(self, hidden: Activations) -> Captured:
        """Run the model's entry, with only block 0 beside it on the device."""
        blocks = self.plan.blocks
        with (
            self.workplace.holds(self.model, "", without=blocks),
            self.workplace.holds(blocks[0], f"{self.plan.prefix}.0"),
        ):
            return capture(self.model, list(blocks), self.batches, hidden)

    def _packed(
        self, parent: nn.Module, parent_name: str, done: Sequence[Solved]
    ) -> dict[str, QuantLinear]:
        """Pack the solver's integers."""
        layers = {}
        for solved in done:
            settings = self.plan.settings[_joined(parent_name, solved.name)]
            layers[solved.name] = quantized_from(
                parent.get_submodule(solved.name),
                solved.solution,
                settings.bits,
                settings.group_size,
                settings.checkpoint_format,
            )
        return layers

    def _stored(self, index: int, parent: nn.Module, name: str) -> Finished | None:
        """Give what an earlier run has left of a block, if all ranks can read it."""
        if self.journal is None:
            return None
        settings, device = self.plan.settings, self.workplace.device
        stored = self.journal.read(index, parent, name, settings, device)
        return stored if self.ranks.all(stored is not None) else None

    def _keep(
        self,
        index: int,
        parent_name: str,
        layers: Mapping[str, QuantLinear],
        report: Sequence[ModuleReport] | None,  # None if the journal has it
        home: torch.device,
    ) -> None:
        """Write a finished block to disk, and put its layers where the dense ones were."""
        journal, disk = self.journal, self.workplace.disk
        named = {_joined(parent_name, name): layer for name, layer in layers.items()}
        if journal is not None and report is not None:
            self.ranks.agree(lambda: journal.write(index, named, report))
        for name, layer in named.items():
            if journal is not None and disk is not None:
                disk.move(layer, name, journal.file(index))
            else:
                layer.to(home)

    def what_is_kept(self) -> str:
        """Say after an interruption what is not lost."""
        if self.journal is None:
            return "Interrupted; nothing is kept. Name a work_dir to be able to go on."
        return (
            f"Interrupted; {self.journal.finished()} of {len(self.plan.blocks)} blocks are kept in "
            f"{self.journal.folder}. Load the model and call quantize() as before to go on."
        )


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
        note=solved.note,
    )
