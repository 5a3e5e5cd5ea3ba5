"""Solve a whole block in one forward pass.

A block's steps are solved one after another, each on inputs that the quantized steps before it have
shaped.  Running the block anew for every step costs several passes over all batches.  Here every
batch's pass runs once, in a thread that stops before each linear that reads something new, and goes
on when that linear has been solved.  Only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.capture import BlockCall
from ..calibration.memory import free_bytes
from ..errors import UnsupportedModelError
from ..nn_modules.surgery import features
from ..quantization.hessian import Hessian
from ..quantization.solver import SolverOptions
from .block import (
    Feed,
    Solved,
    check_finite,
    is_same,
    kept_tokens,
    run_block,
    solve_together,
)
from .exact import Exact

# Activations alive in a stopped pass, in units of the widest input and twice the hidden size:
# the residual, the linear's input, and what the model keeps beside them.
_ALIVE = 2


def reading_groups(
    block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, call: BlockCall
) -> list[list[str]]:
    """Run one batch and group the linears by the tensor they read, in the order of running."""
    read: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their addresses apart

    def note(name: str) -> Any:
        def hook(_linear: nn.Module, args: Sequence[Tensor]) -> None:
            x = args[0]
            for other, names in read:
                if is_same(other, x):
                    names.append(name)
                    return
            read.append((x, [name]))

        return hook

    with _hooked({name: (linear, note(name)) for name, linear in linears.items()}):
        run_block(block, hidden, call)
    return [list(dict.fromkeys(names)) for _, names in read]


def fits_one_pass(linears: Mapping[str, nn.Module], feed: Feed) -> bool:
    """Tell whether memory holds the activations of all batches in the midst of a block."""
    if feed.hidden.home != "device":
        return False
    x = feed.hidden[0]
    widest = max(features(linear)[0] for linear in linears.values())
    tokens = sum(hidden.shape[:-1].numel() for hidden in (*feed.hidden, *feed.exact))
    needed = tokens * _ALIVE * (widest + 2 * x.shape[-1]) * x.element_size()
    return bool(needed < free_bytes(x.device) // (1 if x.is_cuda else 2))


def solve_in_one_pass(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    feed: Feed,
    options: Mapping[str, SolverOptions],  # by the names of the linears
    threads: ThreadPoolExecutor,
    exact: Exact | None = None,  # if the feed has exact states
) -> Iterator[Solved]:
    """Solve all linears of a block and replace the hidden states by the quantized block's outputs.

    :param groups: names that read one tensor, in the order of running: from :func:`reading_groups`
    :param threads: one per batch of either stream at least; kept from block to block, because a new
        thread's first product on a GPU takes 60 ms
    :raises NumericsError: naming the linears whose weights or inputs hold NaN or infinity
    """
    stops = {group[0]: (linears[group[0]], _stop_before(group[0])) for group in groups}
    for group in groups:  # blocks of one class are taken to read alike; here that is checked
        stops |= {name: (linears[name], _read_as(group[0], name)) for name in group[1:]}
    exact = exact or Exact(block, {}, {})
    with (
        _hooked(stops),
        exact.watched(_written),
        _forwards(block, feed, threads) as forwards,
        _forwards(block, feed.of_exact(), threads) as exacts,
    ):
        _all_go_on(forwards, exacts, exact)
        for group in groups:
            waiting = [forward for forward in forwards if forward.waits_before == group[0]]
            inputs = features(linears[group[0]])[0]
            hessian = Hessian(inputs, feed.hidden.device)
            for part in feed.ranks.parts(len(forwards)):
                some = hessian if part.start == 0 else Hessian(inputs, feed.hidden.device)
                # Nobody waits where tokens are routed past an expert that the first batch met.
                _add_inputs(some, forwards, exacts, part, group[0], exact)
                if some is not hessian:
                    hessian.merge(some)
            together = {name: linears[name] for name in group}
            yield from solve_together(together, hessian, options, feed.ranks)
            also = [forward for forward in exacts if forward.waits_before == group[0]]
            _all_go_on(waiting, also, exact)
        feed.hidden[:] = [forward.result() for forward in forwards]
        feed.exact[:] = [forward.result() for forward in exacts]
    check_finite(feed)


def _all_go_on(forwards: Sequence[_Forward], exacts: Sequence[_Forward], exact: Exact) -> None:
    """Let passes run to their next stops, the exact ones with the full-precision weights."""
    for forward in forwards:
        forward.go_on()
    with exact.in_place():
        for forward in exacts:
            forward.go_on()


def _add_inputs(
    hessian: Hessian,
    forwards: Sequence[_Forward],
    exacts: Sequence[_Forward],
    part: range,
    name: str,
    exact: Exact,
) -> None:
    """Add the inputs that some passes hold before a linear."""
    for i in part:
        forward, x = forwards[i], forwards[i].input
        if forward.waits_before != name or x is None:
            continue
        wanted = gap = None
        if i < len(exacts) and exacts[i].waits_before == name:
            wanted = exact.matching(name, exacts[i].input, x, forward.tokens)
            gap = exact.gap(name, wanted, exacts[i].residual, forward.residual)
        hessian.add(x, kept_tokens(forward.keep, x), wanted, gap)


class _AbandonedError(Exception):
    """Ends a pass that nobody will let go on."""


class _Forward:
    """One batch's pass through a block, which stops where it is told to."""

    running = threading.local()  # .forward: the pass of this thread

    def __init__(self, block: nn.Module, hidden: Tensor, call: BlockCall, keep: Tensor | None):
        self.keep = keep
        self.tokens = hidden.shape[:-1].numel()
        self.residual = hidden  # as far as the pass has come
        self.waits_before: str | None = None
        self.input: Tensor | None = None  # of the linear it waits before
        self.read: dict[str, int] = {}  # where the input of each stop lay
        self.future: Future[Tensor]
        self._pass = (block, hidden, call)
        self._may_run = threading.Semaphore(0)
        self._has_stopped = threading.Semaphore(0)
        self._finished = False
        self._abandoned = False

    def run(self) -> Tensor:
        """Be the body of the thread."""
        block, hidden, call = self._pass
        self.running.forward = self
        try:
            with ExitStack() as context:  # grad mode and current device belong to a thread
                context.enter_context(torch.no_grad())
                if hidden.is_cuda:
                    context.enter_context(torch.cuda.device(hidden.device))
                self._wait()
                return run_block(block, hidden, call, self.keep)
        finally:
            self._finished = True
            self.waits_before = self.input = None
            self._has_stopped.release()

    def written(self, output: Tensor) -> None:
        """Follow the residual stream."""
        self.residual = self.residual + output.reshape_as(self.residual)

    def stop_before(self, name: str, x: Tensor) -> None:
        """Hand control back to the main thread until it says to go on."""
        self.waits_before, self.input = name, x
        self.read[name] = x.data_ptr()
        self._has_stopped.release()
        self._wait()

    def go_on(self) -> None:
        """Let the pass run to its next stop or its end, and wait for that."""
        self.input = None
        self._may_run.release()
        self._has_stopped.acquire()
        if self._finished:
            self.future.result()  # raises what the pass raised

    def abandon(self) -> None:
        """End a pass that has not finished."""
        if not self._finished:
            self._abandoned = True
            self._may_run.release()

    def result(self) -> Tensor:
        return self.future.result()

    def _wait(self) -> None:
        self._may_run.acquire()
        if self._abandoned:
            raise _AbandonedError


@contextmanager
def _forwards(
    block: nn.Module, feed: Feed, threads: ThreadPoolExecutor
) -> Iterator[list[_Forward]]:
    """Make a pass for each batch; none is left afterwards, whatever happens."""
    batches = zip(feed.hidden, feed.calls, feed.keep, strict=True)
    forwards = [_Forward(block, *batch) for batch in batches]
    for forward in forwards:
        forward.future = threads.submit(forward.run)
    try:
        yield forwards
    finally:
        for forward in forwards:
            forward.abandon()
        wait([forward.future for forward in forwards])


def _written(output: Tensor) -> None:
    _Forward.running.forward.written(output)


def _stop_before(name: str) -> Any:
    def hook(_linear: nn.Module, args: Sequence[Tensor]) -> None:
        _Forward.running.forward.stop_before(name, args[0])

    return hook


def _read_as(first: str, name: str) -> Any:
    def hook(_linear: nn.Module, args: Sequence[Tensor]) -> None:
        if _Forward.running.forward.read.get(first) != args[0].data_ptr():
            raise UnsupportedModelError(
                f"{name} reads the same tensor as {first} in one block and another one in this "
                "block of the same class. Pass BaseQuantizeConfig(true_sequential=False)."
            )

    return hook


@contextmanager
def _hooked(hooks: Mapping[str, tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [linear.register_forward_pre_hook(hook) for linear, hook in hooks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
