"""One block: collect Hessians with hooks on, solve, propagate with hooks off."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import Activations
from ..calibration.capture import BlockCall
from ..errors import NumericsError
from ..nn_modules.qlinear.linear import dense_weight
from ..nn_modules.unfused import without_padding
from ..quantization.hessian import Hessian, Pull
from ..quantization.precision import tensor_cores
from ..quantization.solver import Solution, SolverOptions, by_parts, is_finite
from .careful import solve_carefully
from .exact import Exact
from .ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass
class Feed:
    """What enters a block, per batch, on this rank."""

    hidden: Activations  # [B, T, hidden size]
    calls: list[BlockCall]
    keep: list[Tensor | None]  # [B, T] bool, False where padded
    ranks: Ranks = field(default_factory=Ranks)
    # What enters the block in the full-precision model, for the first batches only.
    exact: Activations = field(default_factory=Activations.none)

    def of_exact(self) -> Feed:
        """Give the batches whose full-precision hidden states are kept, with these."""
        count = len(self.exact)
        return Feed(self.exact, self.calls[:count], self.keep[:count], self.ranks)


@dataclass(frozen=True)
class Solved:
    """One module's integers and how they came about."""

    name: str
    solution: Solution
    error: float
    tokens: int
    seconds: float
    note: str = ""  # what was done otherwise than asked for


def solve_step(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    feed: Feed,
    options: Mapping[str, SolverOptions],  # by the names of the linears
    exact: Exact | None = None,  # of the whole block, if the feed has exact states
) -> Iterator[Solved]:
    """Solve the linears of one step, and leave their dequantized weights in the block.

    Linears that read the same tensor share one Hessian, and those with the same options also one
    factorization.
    """
    exact = exact or Exact(block, {}, {})
    collector = _Collector(linears, exact)
    with collector.hooked(), exact.watched(collector.written):
        starts = [part.start for part in feed.ranks.parts(len(feed.hidden))]
        for i, (hidden, call) in enumerate(zip(feed.hidden, feed.calls, strict=True)):
            if i in starts:
                collector.begin_part()
            collector.keep = feed.keep[i]
            if i < len(feed.exact):
                with exact.in_place():
                    collector.note_exact(block, feed.exact[i], call)
            collector.run(block, hidden, call)
    # What this rank's batches have met may not be what another's have.
    unseen = [[name] for name in linears if name not in collector.seen]
    groups = [sharing.names for sharing in collector.sharing] + unseen
    for names in feed.ranks.agree(lambda: groups):
        together = {name: linears[name] for name in names}
        yield from solve_together(together, collector.hessian(names), options, feed.ranks)


def propagate(block: nn.Module, feed: Feed) -> None:
    """Replace the hidden states by the block's outputs.

    :raises NumericsError: if they hold NaN or infinity
    """
    for i, (hidden, call) in enumerate(zip(feed.hidden, feed.calls, strict=True)):
        feed.hidden[i] = run_block(block, hidden, call, feed.keep[i])
    check_finite(feed)


def check_finite(feed: Feed) -> None:
    """Look at the hidden states after a block.

    :raises NumericsError: if they hold NaN or infinity
    """
    feed.hidden.check_finite("the block's outputs")


def run_block(
    block: nn.Module, hidden: Tensor, call: BlockCall, keep: Tensor | None = None
) -> Tensor:
    """Call a block as the model did; give its hidden states."""
    with without_padding(keep):
        output = block(hidden, *call.args, **call.kwargs)
    if not isinstance(output, (tuple, list)):
        return output  # type: ignore[no-any-return]
    call.outputs = (None, *output[1:])
    result: Tensor = output[0]
    return result


def solve_together(
    linears: Mapping[str, nn.Module],
    hessian: Hessian,
    options: Mapping[str, SolverOptions],  # by the names of the linears
    ranks: Ranks,
) -> Iterator[Solved]:
    """Solve linears of one input, those with the same options as one."""
    ranks.sum_hessian(hessian, any(options[name].correction for name in linears))
    for alike in dict.fromkeys(options[name] for name in linears):
        stacked = {name: linear for name, linear in linears.items() if options[name] == alike}
        yield from _solve_stacked(stacked, hessian, alike, ranks)


def _solve_stacked(
    linears: Mapping[str, nn.Module], hessian: Hessian, options: SolverOptions, ranks: Ranks
) -> Iterator[Solved]:
    """Solve linears as one tall matrix, then part them again."""
    started = time.perf_counter()
    mean = hessian.mean()
    weights = {name: dense_weight(linear) for name, linear in linears.items()}
    tall = torch.cat(list(weights.values()))
    if not is_finite(tall):  # before it spoils what is solved with it
        raise _damaged([name for name, weight in weights.items() if not is_finite(weight)])
    notes: list[str] = []

    def of_rows(rows: slice) -> Solution:
        parts, pull = ranks.row_parts, None
        if options.correction and hessian.is_compared:
            with tensor_cores():
                pull = Pull(
                    by_parts(lambda part: hessian.pull(tall, part), rows, parts),
                    by_parts(lambda part: hessian.doubt(tall, part), rows, parts),
                )
        found, note = solve_carefully(tall[rows], mean, hessian.tokens, options, pull, parts)
        notes.append(note)
        return found

    try:
        solved = ranks.solve(of_rows, len(tall))
    except NumericsError as error:
        raise NumericsError(f"{', '.join(linears)}: {error}") from error
    if notes[0]:
        logger.warning("%s: %s", ", ".join(linears), notes[0])
    seconds = (time.perf_counter() - started) / len(linears)
    row = 0
    for name, linear in linears.items():
        rows = slice(row, row + len(weights[name]))
        part = solved.rows(rows.start, rows.stop)
        with torch.no_grad():
            weight = dense_weight(linear)
            weight.copy_(part.dequantize(weight.dtype))
        lost, whole = torch.stack([part.loss.sum(), part.energy.sum()]).tolist()
        share = lost / whole if whole else 0.0
        yield Solved(name, part, share, hessian.tokens, seconds, notes[0])
        row = rows.stop


def _damaged(names: Sequence[str]) -> NumericsError:
    return NumericsError(
        f"{', '.join(names)}: The weight holds NaN or infinity. The checkpoint is damaged, or "
        "float16 was too narrow for it: load it with torch_dtype=torch.bfloat16."
    )


class _AllSeen(Exception):
    """Ends a block's forward pass once every hooked linear has been reached."""


@dataclass
class _Sharing:
    """Linears that read the same tensor."""

    names: list[str]
    hessian: Hessian  # of the present part of the batches
    earlier: Hessian | None = None  # of the parts before

    def begin_part(self) -> None:
        """Add what there is to the earlier parts."""
        if self.earlier is None:
            self.earlier = self.hessian
        else:
            self.earlier.merge(self.hessian)
        self.hessian = Hessian(len(self.hessian.total), self.hessian.total.device)


@dataclass
class _Collector:
    """Hooks on the linears of one step that feed their inputs to Hessians."""

    linears: Mapping[str, nn.Module]
    exact: Exact
    sharing: list[_Sharing] = field(default_factory=list)
    keep: Tensor | None = None
    seen: set[str] = field(default_factory=set)
    _inputs: dict[str, Tensor] = field(default_factory=dict)  # of the first batch, by first name
    _waiting: set[str] = field(default_factory=set)
    _is_first: bool = True
    # The next batch's inputs in the full-precision model and its residual stream, by name.
    _exact: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _is_exact: bool = False
    _residual: Tensor | None = None
    _tokens: int = 0  # of the batch

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            linear.register_forward_pre_hook(self._hook(name))
            for name, linear in self.linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_part(self) -> None:
        """Sum up the next batches apart from those before, and add the sums."""
        for sharing in self.sharing:
            sharing.begin_part()

    def hessian(self, names: Sequence[str]) -> Hessian:
        """Give the Hessian of linears of one input; an empty one if none was met."""
        for sharing in self.sharing:
            if names[0] in sharing.names:
                sharing.begin_part()
                assert sharing.earlier is not None
                whole = sharing.names == list(names)
                return sharing.earlier if whole else copy.deepcopy(sharing.earlier)
        weight = dense_weight(self.linears[names[0]])
        return Hessian(weight.shape[1], weight.device)

    def note_exact(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> None:
        """Note the inputs of the linears in a pass of the full-precision block."""
        self._is_exact, self._waiting, self._residual = True, set(self.seen), hidden
        with suppress(_AllSeen):
            run_block(block, hidden, call, self.keep)
        self._is_exact = False

    def run(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> None:
        self._waiting, self._residual = set(self.seen), hidden
        self._tokens = hidden.shape[:-1].numel()
        with suppress(_AllSeen):
            run_block(block, hidden, call, self.keep)
        self._is_first = False
        self._inputs.clear()
        self._exact.clear()

    def written(self, output: Tensor) -> None:
        """Follow the residual stream."""
        assert self._residual is not None
        self._residual = self._residual + output.reshape_as(self._residual)

    def _hook(self, name: str) -> Any:
        def note(_linear: nn.Module, args: Sequence[Tensor]) -> None:
            if self._is_exact:
                self._exact[name] = args[0], self._residual
            else:
                self._add(name, args[0])
            self._waiting.discard(name)
            # The rest of the block's forward is wanted by nobody.  In the first pass it is not
            # known yet which linears will run.
            if not self._is_first and not self._waiting:
                raise _AllSeen

        return note

    def _add(self, name: str, x: Tensor) -> None:
        if self._is_first:
            self._assign(name, x)
        for sharing in self.sharing:
            if sharing.names[0] == name:
                noted, residual = self._exact.get(name, (None, None))
                exact = self.exact.matching(name, noted, x, self._tokens)
                gap = self.exact.gap(name, exact, residual, self._residual)
                sharing.hessian.add(x, kept_tokens(self.keep, x), exact, gap)

    def _assign(self, name: str, x: Tensor) -> None:
        """Find the linears that read the very same tensor; their inputs are kept alive for that."""
        if name in self.seen:
            return
        self.seen.add(name)
        for sharing in self.sharing:
            other = self._inputs[sharing.names[0]]
            if is_same(other, x):
                sharing.names.append(name)
                return
        self._inputs[name] = x
        self.sharing.append(_Sharing([name], Hessian(x.shape[-1], x.device)))


def is_same(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors view the same values, on the meta device and empty ones too."""
    return (
        x.shape == y.shape
        and x.stride() == y.stride()
        and x.storage_offset() == y.storage_offset()
        and x.untyped_storage()._cdata == y.untyped_storage()._cdata
    )


def kept_tokens(keep: Tensor | None, x: Tensor) -> Tensor | None:
    """Give the mask of real tokens in the shape of a linear's input ``[..., K]``."""
    if keep is None:
        return None
    if x.shape[:-1] == keep.shape:
        return keep
    if x.shape[:-1] == keep.T.shape:  # ChatGLM's own code has time first
        return keep.T
    # Some models flatten batch and time; anything else is a choice of tokens of its own.
    return keep.flatten() if x.shape[:-1] == (keep.numel(),) else None
