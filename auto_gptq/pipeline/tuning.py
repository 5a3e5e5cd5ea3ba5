"""Tune the integers and scales of a whole block by gradients, starting from GPTQ's.

GPTQ solves one linear after another, each for its own outputs.  Here all linears of a block change
together for the block's outputs, those of the full-precision model on its own hidden states.  Codes
are rounded in the forward pass and left out of the backward pass (the straight-through estimator;
EfficientQAT, arXiv 2407.11062, section 3.2, trains blocks like that from rounded weights).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..formats.gptq import trivial_g_idx
from ..nn_modules.qlinear.linear import dense_weight
from ..quantization.precision import tensor_cores
from .block import Feed, Solved, kept_tokens

logger = logging.getLogger(__name__)

# Steps of Adam at the start, in codes and as shares of the scales; they fall to 0 by a cosine.
_CODE_RATE = 5e-3
_SCALE_RATE = 1e-3
BETAS = (0.9, 0.95)  # some dozens of steps: a long memory would never forget the first ones
_HELD_OUT = 8  # every eighth batch is not tuned on, and decides whether tuning has been of use


@dataclass
class _Tuned:
    """One linear's codes before rounding, and the factors on its scales."""

    solved: Solved
    codes: Tensor  # [N, K] fp32
    factors: Tensor  # [N, G] fp32
    zeros: Tensor  # [N, K] fp32
    together: int  # see inputs_together
    highest: int

    @classmethod
    def start(cls, solved: Solved, unrounded: Tensor, bits: int) -> _Tuned:
        solution = solved.solution
        return cls(
            solved,
            unrounded.to(torch.float32).requires_grad_(True),
            torch.ones_like(solution.scales).requires_grad_(True),
            solution.zeros[:, solution.g_idx].to(torch.float32),
            inputs_together(solution.g_idx),
            (1 << bits) - 1,
        )

    def weight(self) -> Tensor:  # [N, K]
        solution = self.solved.solution
        codes = self.codes.clamp(0, self.highest)
        codes = codes + (codes.round() - codes).detach()
        scales = spread(solution.scales * self.factors, solution.g_idx, self.together)
        return (codes - self.zeros) * scales

    def unchanged(self) -> Solved:
        return replace(self.solved, solution=replace(self.solved.solution, unrounded=None))

    @torch.no_grad()
    def finish(self, scale_dtype: torch.dtype) -> Solved:
        solution = self.solved.solution
        scales = (solution.scales * self.factors).to(scale_dtype).to(torch.float32)
        codes = self.codes.clamp(0, self.highest).round().to(torch.uint8)
        return replace(
            self.solved,
            solution=replace(solution, codes=codes, scales=scales, unrounded=None),
        )


def tune_block(
    block: nn.Module,
    done: Sequence[Solved],
    bits: dict[str, int],  # by the names of the linears
    feed: Feed,  # the hidden states that enter the quantized block; its exact ones are not read
    wanted: Sequence[Tensor],  # per batch: the full-precision block's outputs; for the first ones
    epochs: int,
) -> list[Solved]:
    """Give better integers for a block's linears, and leave their weights in the block.

    The block runs in fp32.  One batch is one step.  GPTQ's integers stay where the tuned ones are
    no better on the batches that are held out.
    """
    run = _Fp32Run(block, feed, wanted)
    learnt, judged = held_out(len(wanted))
    tuned = [
        _Tuned.start(solved, solved.solution.unrounded, bits[solved.name])
        for solved in done
        if solved.solution.unrounded is not None
    ]
    groups = [
        {"params": [x.codes for x in tuned], "lr": _CODE_RATE},
        {"params": [x.factors for x in tuned], "lr": _SCALE_RATE},
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    total = epochs * len(learnt)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2
    )
    with tensor_cores():
        before = run.mean({x.solved.name: x.solved.solution.dequantize() for x in tuned}, judged)
        with torch.enable_grad():
            for i in shuffled(learnt, epochs):
                optimizer.zero_grad()
                run.distance(i, {x.solved.name: x.weight() for x in tuned}).backward()
                optimizer.step()
                falling.step()
        finished = {x.solved.name: x.finish(torch.float16) for x in tuned}
        after = run.mean({name: x.solution.dequantize() for name, x in finished.items()}, judged)
    logger.debug("Tuning changed the block's error from %g to %g.", before, after)
    if not after < before:
        finished = {x.solved.name: x.unchanged() for x in tuned}
    result = [finished.get(solved.name, solved) for solved in done]
    with torch.no_grad():
        for solved in result:
            weight = dense_weight(block.get_submodule(solved.name))
            weight.copy_(solved.solution.dequantize().to(weight.dtype))
    return result


class _Fp32Run:
    """Runs a block in fp32 with other weights in it."""

    def __init__(self, block: nn.Module, feed: Feed, wanted: Sequence[Tensor]) -> None:
        self._block, self._feed, self._wanted = block, feed, wanted
        self._constant = {
            name: tensor.detach().to(torch.float32)
            for name, tensor in (*block.named_parameters(), *block.named_buffers())
            if tensor.is_floating_point()
        }

    def distance(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Give the error of a batch: the mean over tokens of its share of the token's energy.

        :param weights: ``[N, K]``, by the names of the linears
        """
        hidden = self._feed.hidden[index]
        call = self._feed.calls[index].to(hidden.device, torch.float32)
        inputs = hidden.to(torch.float32), *call.args
        placed = {f"{name}.weight": self._as_own(name, weight) for name, weight in weights.items()}
        found = torch.func.functional_call(
            self._block, self._constant | placed, inputs, call.kwargs
        )
        found = found[0] if isinstance(found, tuple) else found
        wanted = self._wanted[index].to(torch.float32)
        lost = (found - wanted).square().mean(-1) / wanted.square().mean(-1).clamp(min=1e-12)
        keep = kept_tokens(self._feed.keep[index], found)
        mean: Tensor = lost.mean() if keep is None else lost[keep].mean()
        return mean

    @torch.no_grad()
    def mean(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> float:
        """Give the mean error of some batches."""
        errors = [self.distance(i, weights) for i in batches]
        return float(torch.stack(errors).mean())

    def _as_own(self, name: str, weight: Tensor) -> Tensor:
        # GPT-2's Conv1D keeps [in, out]; it has `nf` where a Linear has `out_features`.
        return weight.t() if hasattr(self._block.get_submodule(name), "nf") else weight


def held_out(batches: int) -> tuple[list[int], list[int]]:
    """Part batches into those to learn from and those to judge by; a lone one is both."""
    judged = range(min(_HELD_OUT, batches) - 1, batches, _HELD_OUT)
    learnt = [i for i in range(batches) if i not in judged]
    return learnt or list(judged), list(judged)


def inputs_together(g_idx: Tensor) -> int:
    """Give how many inputs a group has, or 0 if they are scattered."""
    size = int((g_idx == 0).sum())
    return size if torch.equal(g_idx, trivial_g_idx(len(g_idx), size, g_idx.device)) else 0


def spread(
    groups: Tensor,  # [N, G]
    g_idx: Tensor,  # [K]
    together: int,  # see inputs_together
) -> Tensor:  # [N, K]
    """Give every input what its group has."""
    if not together:
        return groups[:, g_idx]
    # The gradient of an index takes many times as long.
    return groups.repeat_interleave(together, 1)[:, : len(g_idx)]


def shuffled(batches: Sequence[int], epochs: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]
