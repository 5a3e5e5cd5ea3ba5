"""The Hessian of a layer's inputs, and its damped inverse in factored form."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError

logger = logging.getLogger(__name__)

# After a failed factorization the damping grows by this factor, from at least this share of the
# mean diagonal, until it outweighs the Hessian itself.
_DAMPING_GROWTH = 10
_LEAST_RAISED_DAMPING = 1e-4


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
    if not torch.isfinite(diagonal).all():
        raise NumericsError(
            "The layer's inputs hold NaN or infinity. If the model runs in float16, "
            "load it with torch_dtype=torch.bfloat16 or torch.float32."
        )
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    damp = damp_percent
    while damp <= 1:
        damped = hessian.to(torch.float64)
        damped.diagonal().copy_(diagonal + damp * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            if damp > damp_percent:
                logger.warning(
                    "The Hessian is not positive definite at damp_percent %g; used %g instead.",
                    damp_percent,
                    damp,
                )
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            # .contiguous(): the result may be column-major, and kernels read it by rows.
            return Factor(inverse.to(torch.float32).contiguous(), damp)
        damp = max(damp * _DAMPING_GROWTH, _LEAST_RAISED_DAMPING)
    raise NumericsError(
        f"The Hessian cannot be factored at any damp_percent from {damp_percent:g} to 1. "
        "Use more or more varied calibration examples."
    )
