"""What a run will take, and what will be too little, said before it begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from ..calibration.examples import Batch
from ..nn_modules.surgery import features, find_linears
from .plan import Plan

logger = logging.getLogger(__name__)


def say_what_is_needed(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Log the work and the room it takes.

    How large the hidden states are is said where they are put, in ``calibration/activations.py``.
    """
    weights = packed = 0
    for name, settings in plan.settings.items():
        inputs, outputs = features(model.get_submodule(name))
        weights += inputs * outputs
        packed += inputs * outputs * settings.bits // 8
    sizes = [sum(p.numel() for p in block.parameters()) for block in plan.blocks]
    logger.info(
        "Quantizing %d linears with %.3g billion weights in %d blocks on %s, with %d tokens. "
        "A block at work takes %.2f GB, all packed weights %.2f GB.",
        len(plan.settings),
        weights / 1e9,
        len(plan.blocks),
        device,
        sum(batch.tokens for batch in batches),
        max(sizes) * dtype.itemsize / 1e9,
        packed / 1e9,
    )


def warn_of_few_tokens(plan: Plan, batches: Sequence[Batch]) -> None:
    """Say so where the calibration is too short for the model's widest linear."""
    linears = find_linears(plan.blocks[0])
    inputs = max((features(linear)[0] for linear in linears.values()), default=0)
    tokens = sum(batch.tokens for batch in batches)
    if tokens < 2 * inputs:
        logger.warning(
            "The examples hold %d tokens for linears of up to %d inputs. Fewer than twice as many "
            "tokens as inputs say little about how these go together: use more or longer examples.",
            tokens,
            inputs,
        )
