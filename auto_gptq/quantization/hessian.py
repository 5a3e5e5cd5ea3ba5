"""The Hessian of a layer's inputs, and its damped inverse in factored form."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError

logger = logging.getLogger(__name__)

# Damping tried after a failed factorization, as multiples of the one asked for.
_DAMPING_STEPS = (1.0, 3.0, 10.0, 30.0, 100.0)


class Hessian:
    """Running mean of ``x xᵀ`` over the tokens a layer sees (GPTQ, section 3: H = X Xᵀ).

    AutoGPTQ's Hessian is the same matrix times 2 * tokens / sequences; the solver's choices do
    not depend on that factor.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(
        self,
        x: Tensor,  # [..., size] inputs of the layer
        keep: Tensor | None = None,  # [...] bool, False where x is padding
    ) -> None:
        """Add the outer products of all kept tokens, in fp32."""
        rows = x.reshape(-1, x.shape[-1]) if keep is None else x[keep]
        rows = rows.to(torch.float32)
        self.total.addmm_(rows.t(), rows)
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """Give ``[size, size]`` fp32: the mean over tokens, or zeros if none was seen."""
        return self.total / max(self.tokens, 1)


@dataclass(frozen=True)
class Factor:
    """Upper triangular ``inverse`` with ``inverseᵀ @ inverse = (H + damping)⁻¹``."""

    inverse: Tensor  # [K, K] fp32, contiguous, upper triangular
    damp_percent: float  # the damping that was needed


def factorize(
    hessian: Tensor,  # [K, K] in the order in which columns will be processed
    damp_percent: float,
) -> Factor:
    """Damp and factor a Hessian without ever inverting it.

    With J the reversal, ``J H J = L Lᵀ`` gives ``H = R Rᵀ`` for the upper triangular
    ``R = J L J``, and ``R⁻¹`` is the matrix that GPTQ (section 4, step 3) gets as the Cholesky
    factor of the inverse: one factorization instead of two and no inverse.

    An input that was always 0 gets 1 on the diagonal: its weights are rounded, untouched by and
    not touching the others.

    :raises NumericsError: if H holds NaN or infinity, or cannot be factored at any damping
    """
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    mean = torch.where(alive, diagonal, 1.0).mean()
    if not torch.isfinite(mean):
        raise NumericsError(
            "The layer's inputs hold NaN or infinity. If the model runs in float16, "
            "load it with torch_dtype=torch.bfloat16 or torch.float32."
        )
    identity = torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device)
    for step in _DAMPING_STEPS:
        damp = damp_percent * step
        damped = hessian.to(torch.float64)
        damped.diagonal().copy_(torch.where(alive, diagonal, 1.0) + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            if step > 1:
                logger.warning(
                    "The Hessian is not positive definite at damp_percent %g; used %g instead.",
                    damp_percent,
                    damp,
                )
            right = lower.flip(0, 1)
            inverse = torch.linalg.solve_triangular(right, identity, upper=True)
            # .contiguous(): the result may be column-major, and kernels read it by rows.
            return Factor(inverse.to(torch.float32).contiguous(), damp)
    raise NumericsError(
        f"The Hessian cannot be factored, even with damp_percent {damp:g}. "
        "Use more or more varied calibration examples."
    )
