"""The damped inverse of a Hessian in factored form."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FactorizationError, NumericsError
from .hessian import stripes

logger = logging.getLogger(__name__)

# After a failed factorization the damping grows by this factor, from at least this share of the
# mean diagonal, until it outweighs the Hessian itself.
_DAMPING_GROWTH = 10
_LEAST_RAISED_DAMPING = 1e-4
# Triangular matrices up to this size are inverted by a triangular solve.
_SOLVED_DIRECTLY = 256
# The largest matrix that a GPU's library factors in about the time of its halves: waiting for one
# column after another is what takes time there.
_FACTORED_DIRECTLY = 4096
_STRIPES = 4  # in which the halves of a product that are not 0 are taken


@dataclass(frozen=True)
class Factor:
    """Upper triangular ``inverse`` with ``inverseᵀ @ inverse = (H + damping)⁻¹``."""

    inverse: Tensor  # [K, K] fp32, contiguous, upper triangular
    damp_percent: float  # the damping that was needed

    def whiten(self, matrix: Tensor) -> Tensor:
        """Give ``matrix @ inverseᵀ`` ``[N, K]``, without most of what is multiplied by 0."""
        white = torch.empty_like(matrix)
        for stripe in stripes(len(self.inverse), _STRIPES):
            later = slice(stripe.start, None)
            torch.mm(matrix[:, later], self.inverse[stripe, later].t(), out=white[:, stripe])
        return white

    def unwhiten(self, white: Tensor) -> Tensor:
        """Give ``white @ inverse`` ``[N, K]``: of what was whitened, ``matrix @ H⁻¹``."""
        matrix = torch.empty_like(white)
        for stripe in stripes(len(self.inverse), _STRIPES):
            earlier = slice(0, stripe.stop)
            torch.mm(white[:, earlier], self.inverse[earlier, stripe], out=matrix[:, stripe])
        return matrix


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

    :raises NumericsError: if H holds NaN or infinity
    :raises FactorizationError: if H cannot be factored at any damping
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
        damped_diagonal = diagonal + damp * diagonal.mean()
        ways = [_invert_in_halves] if hessian.is_cuda and len(hessian) > _FACTORED_DIRECTLY else []
        for invert in (*ways, _invert_factor, _invert_factor_fp64):
            inverse = invert(hessian, damped_diagonal)
            if inverse is None:
                continue
            if damp > damp_percent:
                logger.warning(
                    "The Hessian is not positive definite at damp_percent %g; used %g instead.",
                    damp_percent,
                    damp,
                )
            return Factor(inverse, damp)
        damp = max(damp * _DAMPING_GROWTH, _LEAST_RAISED_DAMPING)
    raise FactorizationError(
        f"The Hessian cannot be factored at any damp_percent from {damp_percent:g} to 1. "
        "Use more or more varied calibration examples."
    )


def _invert_factor(
    hessian: Tensor,  # [K, K]
    diagonal: Tensor,  # [K] what takes the place of its diagonal
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().copy_(diagonal)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    return None if failed else invert_upper(lower.flip(0, 1)).to(torch.float32)


def _invert_factor_fp64(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    return _invert_factor(hessian, diagonal, torch.float64)


def _invert_in_halves(
    hessian: Tensor,  # [K, K]
    diagonal: Tensor,  # [K] what takes the place of its diagonal
) -> Tensor | None:
    """Factor a large matrix by halves, which leaves most of the work to the tensor cores.

    With ``H = [[A, B], [Bᵀ, C]]`` and the inverse factor V of C, ``X = B Vᵀ`` is the factor's
    corner; what remains of A is ``A - X Xᵀ``, with inverse factor U; and the corner of the inverse
    is ``-U X V``.  Products whose errors would be carried on are taken in 22 bits, which three
    products in 16 bits give once the diagonal is brought to 1.
    """
    root = diagonal.rsqrt()
    scaled = hessian * root[:, None]
    scaled *= root
    scaled.diagonal().fill_(1.0)
    inverse = torch.zeros_like(scaled)
    failures: list[Tensor] = []

    def go_on(part: slice) -> None:
        size = part.stop - part.start
        if size <= _FACTORED_DIRECTLY:
            lower, failed = torch.linalg.cholesky_ex(scaled[part, part].flip(0, 1))
            failures.append(failed)
            inverse[part, part] = invert_upper(lower.flip(0, 1))
            return
        middle = part.start + size // 2
        upper, last = slice(part.start, middle), slice(middle, part.stop)
        go_on(last)
        corner = _Split.of(scaled[upper, last]).times(_Split.of(inverse[last, last]))
        split = _Split.of(corner)
        for stripe in stripes(middle - part.start, _STRIPES):
            there = slice(upper.start + stripe.start, middle)
            rest = slice(stripe.start, None)
            scaled[upper.start + stripe.start : upper.start + stripe.stop, there] -= split.rows(
                stripe
            ).times(split.rows(rest))
        go_on(upper)
        corner = split.high @ inverse[last, last].to(torch.float16)
        inverse[upper, last] = torch.mm(
            inverse[upper, upper].to(torch.float16).neg_(), corner, out_dtype=torch.float32
        )

    go_on(slice(0, len(hessian)))
    inverse *= root
    bad = torch.stack([*failures, (~torch.isfinite(inverse.sum())).to(failures[0].dtype)])
    return None if bad.any() else inverse


@dataclass(frozen=True)
class _Split:
    """A matrix as the sum of two in 16 bits."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Split:
        high = matrix.to(torch.float16)
        return cls(high, (matrix - high).to(torch.float16))

    def rows(self, rows: slice) -> _Split:
        return _Split(self.high[rows], self.low[rows])

    def times(self, other: _Split) -> Tensor:
        """Multiply by the other's transpose; what both leave out of 16 bits is left out."""
        left = torch.cat([self.high, self.high, self.low], 1)
        right = torch.cat([other.high, other.low, other.high], 1)
        return torch.mm(left, right.t(), out_dtype=torch.float32)


def invert_upper(matrix: Tensor) -> Tensor:
    """Invert an upper triangular matrix ``[K, K]``; the result has contiguous rows.

    Small blocks on the diagonal are inverted together; then pairs of neighbours are joined, by
    [[A, B], [0, C]]⁻¹ = [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]], until one block is left.  Nearly all work is
    in large matrix products: a triangular solve against the identity is several times slower.
    """
    size = len(matrix)
    halvings = max(0, math.ceil(math.log2(size / _SOLVED_DIRECTLY)))
    block = -(-size // 2**halvings)
    padded = torch.eye(block << halvings, dtype=matrix.dtype, device=matrix.device)
    inverse = padded.clone()
    padded[:size, :size] = matrix
    identity = torch.eye(block, dtype=matrix.dtype, device=matrix.device)
    solved = torch.linalg.solve_triangular(_blocks(padded, block, 0), identity, upper=True)
    _blocks(inverse, block, 0).copy_(solved)
    while block < len(padded):
        inverted, corners = _blocks(inverse, block, 0), _blocks(padded, block, 1)[::2]
        joined = inverted[::2] @ (corners @ inverted[1::2])
        _blocks(inverse, block, 1)[::2].copy_(joined.neg_())
        block *= 2
    return inverse[:size, :size]


def _blocks(matrix: Tensor, block: int, above: int) -> Tensor:
    """View the square blocks on the diagonal, or just above it, as ``[count, block, block]``."""
    count = len(matrix) // block
    grid = matrix.view(count, block, count, block)
    return grid.diagonal(above, 0, 2).permute(2, 0, 1)
