"""Tune the integers and scales of a whole block by gradients, starting from GPTQ's.

GPTQ solves one linear after another, each for its own outputs.  Here all linears of a block change
together for the block's outputs, those of the full-precision model on its own hidden states.  Codes
are rounded in the forward pass and left out of the backward pass (the straight-through estimator;
EfficientQAT, arXiv 2407.11062, section 3.2, trains blocks like that from rounded weights).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..nn_modules.qlinear.linear import dense_weight
from ..quantization.precision import tensor_cores
from .block import Feed, Solved

# Steps of Adam at the start, in codes and as shares of the scales; they fall to 0 by a cosine.
_CODE_RATE = 5e-3
_SCALE_RATE = 1e-3
_BETAS = (0.9, 0.95)  # some dozens of steps: a long memory would never forget the first ones


@dataclass
class _Tuned:
    """One linear's codes before rounding, and the factors on its scales."""

    solved: Solved
    codes: Tensor  # [N, K] fp32
    factors: Tensor  # [N, G] fp32
    highest: int

    @classmethod
    def start(cls, solved: Solved, unrounded: Tensor, bits: int) -> _Tuned:
        return cls(
            solved,
            unrounded.to(torch.float32).requires_grad_(True),
            torch.ones_like(solved.solution.scales).requires_grad_(True),
            (1 << bits) - 1,
        )

    def weight(self) -> Tensor:  # [N, K]
        solution = self.solved.solution
        codes = self.codes.clamp(0, self.highest)
        codes = codes + (codes.round() - codes).detach()
        scales = (solution.scales * self.factors)[:, solution.g_idx]
        return (codes - solution.zeros[:, solution.g_idx]) * scales

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

    The block runs in fp32.  One batch is one step.
    """
    tuned = [
        _Tuned.start(solved, solved.solution.unrounded, bits[solved.name])
        for solved in done
        if solved.solution.unrounded is not None
    ]
    constant = {
        name: tensor.detach().to(torch.float32)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if tensor.is_floating_point()
    }
    groups = [
        {"params": [x.codes for x in tuned], "lr": _CODE_RATE},
        {"params": [x.factors for x in tuned], "lr": _SCALE_RATE},
    ]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    total = epochs * len(wanted)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2
    )
    with torch.enable_grad(), tensor_cores():
        for i in _shuffled(len(wanted), epochs):
            weights = {f"{x.solved.name}.weight": _placed(block, x) for x in tuned}
            call = feed.calls[i].to(feed.hidden[i].device, torch.float32)
            inputs = feed.hidden[i].to(torch.float32), *call.args
            found = torch.func.functional_call(block, constant | weights, inputs, call.kwargs)
            found = found[0] if isinstance(found, tuple) else found
            optimizer.zero_grad()
            _distance(found, wanted[i].to(torch.float32), feed.keep[i]).backward()
            optimizer.step()
            falling.step()
    finished = {x.solved.name: x.finish(torch.float16) for x in tuned}
    result = [finished.get(solved.name, solved) for solved in done]
    with torch.no_grad():
        for solved in result:
            weight = dense_weight(block.get_submodule(solved.name))
            weight.copy_(solved.solution.dequantize().to(weight.dtype))
    return result


def _placed(block: nn.Module, tuned: _Tuned) -> Tensor:
    """Give the weight in the shape of the linear's own: Conv1D's is transposed."""
    weight = tuned.weight()
    return weight.t() if hasattr(block.get_submodule(tuned.solved.name), "nf") else weight


def _distance(found: Tensor, wanted: Tensor, keep: Tensor | None) -> Tensor:
    """Give the mean over tokens of the error's share of the token's energy."""
    lost = (found - wanted).square().mean(-1) / wanted.square().mean(-1).clamp(min=1e-12)
    return lost.mean() if keep is None else lost[keep].mean()


def _shuffled(count: int, epochs: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).tolist()
