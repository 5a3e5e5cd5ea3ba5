"""One token after another on the device, as a captured graph where there are graphs.

The host only starts the steps. Whether all rows have ended it asks every few steps, about the steps
before those it has just started, so that the device never waits for the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.decode_ops import append
from .request import Request

_STEPS_PER_CHECK = 8  # on a GPU; at most twice as many are done in vain
_FIRST_STEPS = 2  # run as they are before the step is captured: libraries set themselves up


_PLACES = 256  # the cache and the tokens' places come in multiples of this many


class Decoder(Protocol):
    """A model that continues a batch of sequences, all of which are as long."""

    length: Tensor  # [1] int64: tokens that its cache holds of each row, padding among them

    def reserve(self, batch: int, capacity: int) -> None:
        """Make room for so many tokens of so many rows."""

    def prefill(self, prompt: Tensor, first: Tensor) -> Tensor:
        """Start anew with prompts ``[B, T]``; give the logits ``[B, V]`` of what follows.

        :param first: ``[B]``, the place of each row's first token, after its padding
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token ``[B]`` to each row, on the device alone; give the logits ``[B, V]``."""


class Loop:
    """The tokens of a batch and the step that appends one to each row."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        batch, device = len(request.prompt), request.prompt.device
        capacity = -(-request.most // _PLACES) * _PLACES
        decoder.reserve(batch, capacity)
        self._decoder = decoder
        self._tokens = torch.empty(batch, capacity, dtype=torch.long, device=device)
        self._ended = torch.empty(batch, dtype=torch.bool, device=device)
        self._graph: Any = None
        self._made_for = request
        self._request = request

    def fits(self, request: Request) -> bool:
        """Tell whether this loop, with the graph it may have captured, can serve a request."""
        return (
            len(self._tokens) == len(request.prompt)
            and self._tokens.shape[1] >= request.most
            and self._made_for.settings == request.settings
        )

    def run(self, request: Request, put: Callable[[Tensor], None] | None = None) -> Tensor:
        """Give prompts and continuations ``[B, *]``.

        :param put: called with each step's tokens ``[B]``, on the CPU
        """
        self._request = request
        length = request.prompt.shape[1]
        self._tokens[:, :length] = request.prompt
        self._tokens[:, length:] = request.prompt[:, -1:]
        self._ended.zero_()
        logits = self._decoder.prefill(request.prompt, request.first)
        self._append(logits)
        done = self._run_to_end(length + 1, put)
        return self._tokens[:, : self._last(length, done)].clone()

    def _run_to_end(self, done: int, put: Callable[[Tensor], None] | None) -> int:
        """Run steps until all rows have ended or are full; give how long they are then."""
        steps_per_check = _STEPS_PER_CHECK if self._tokens.is_cuda and put is None else 1
        asked: _Answer | None = None
        most = self._request.most
        while True:
            if put is not None:
                put(self._tokens[:, done - 1].cpu())
            if self._request.stops is not None:
                answer = _Answer(self._ended)
                waits = steps_per_check == 1
                if answer.get() if waits else asked is not None and asked.get():
                    return done
                asked = answer
            if done >= most:
                return done
            for _ in range(min(steps_per_check, most - done)):
                self._step(done - self._request.prompt.shape[1])
                done += 1

    def _step(self, number: int) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        self._advance()
        if self._tokens.is_cuda and number >= _FIRST_STEPS:
            self._made_for = self._request  # the graph reads its tensors: they must stay alive
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._advance()

    def _advance(self) -> None:
        newest = self._tokens.index_select(1, self._decoder.length).squeeze(1)
        self._append(self._decoder.step(newest))

    def _append(self, logits: Tensor) -> None:  # [B, V]
        """Choose what follows, at the place that the decoder has come to."""
        request = self._request
        place = self._tokens, self._decoder.length, self._ended, request.stops, request.padding
        if not request.samples and not request.processors:
            torch.ops.auto_gptq.append_best(logits, *place)
            return
        scores = logits.to(torch.float32)
        for process in request.processors:
            scores = process(self._tokens, scores)
        append(_sample(scores) if request.samples else scores.argmax(-1), *place)

    def _last(self, begin: int, end: int) -> int:
        """Give where the longest row ends, of what the host may have let run too far."""
        stops = self._request.stops
        if stops is None:
            return end
        stopped = torch.isin(self._tokens[:, begin:end], stops)
        counts = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, end - begin)
        return begin + int(counts.max())


class _Answer:
    """Whether all rows have ended, on its way to the host."""

    def __init__(self, ended: Tensor) -> None:
        self._event = None
        self._answer = ended.all()
        if ended.is_cuda:
            self._answer = self._answer.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._answer)


def _sample(scores: Tensor) -> Tensor:  # [B, V] → [B]
    """Draw from the softmax: what torch.multinomial does for one draw, without its checks.

    Those would make the device wait; the random numbers and the tokens are the same.
    """
    probabilities = scores.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)
