"""Solve also where data is poor: few tokens, a Hessian without a factor, scales out of range."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import FactorizationError, NumericsError
from ..quantization.hessian import Pull
from ..quantization.solver import Solution, SolverOptions, round_to_nearest, solve

# Fewer tokens than inputs leave directions of the input in which the Hessian knows nothing.
TOKENS_PER_INPUT = 1


def solve_carefully(
    weight: Tensor,  # [N, K]
    hessian: Tensor,  # [K, K] mean over the tokens
    tokens: int,
    options: SolverOptions,
    pull: Callable[[], Pull] | None = None,
    parts: int = 1,
) -> tuple[Solution, str]:
    """Solve one matrix; say what was done otherwise than asked for, or nothing.

    :raises NumericsError: if the weight or the Hessian holds NaN or infinity, or a scale would
    """
    enough = TOKENS_PER_INPUT * weight.shape[1]
    note = ""
    if tokens == 0:
        found = round_to_nearest(weight, hessian, options)
        note = "saw no calibration token; its weights are only rounded."
    else:
        if tokens < enough:
            hessian = blend(hessian, tokens / enough)
            note = (
                f"saw {tokens} calibration tokens, fewer than its {weight.shape[1]} inputs; it was "
                f"solved with {tokens / enough:.0%} of its Hessian's off-diagonal part."
            )
        try:
            found = solve(weight, hessian, options, pull, parts)
        except FactorizationError as error:
            found = round_to_nearest(weight, hessian, options)
            note = f"was only rounded: {error}"
    if not torch.isfinite(found.scales).all():
        raise NumericsError(
            f"A scale is too large for {options.rule.scale_dtype}: the weights reach "
            f"{float(weight.abs().max()):.3g}. Leave the module dense, by `dynamic`."
        )
    return found, note


def blend(hessian: Tensor, share: float) -> Tensor:
    """Keep a share of what is off the diagonal: the less data, the less of it is more than chance.

    (Shrinkage to the diagonal, as Ledoit and Wolf 2004 do to a multiple of the identity.)
    """
    return torch.lerp(hessian.diagonal().diag(), hessian, share)
