"""The Hessian of a layer's inputs, and its damped inverse in factored form."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FactorizationError, NumericsError

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
_HALF_STRIPES = 4


# Columns of a stripe in which a Hessian is summed on a GPU: narrower ones save more of the upper
# half, but make products of less convenient shape.
_STRIPE = 1024
_ALIGNED = 128  # stripes that start elsewhere get a kernel of half the speed
_HALF = 2  # bytes of a 16-bit number
SAMPLED = 8  # of so many outputs one tells how much of a pull is chance


@dataclass(frozen=True)
class Pull:
    """Where the full-precision model's outputs pull those of a layer."""

    whole: Tensor  # [N, K] fp32, see Hessian.pull
    doubt: Tensor  # [ceil(N / SAMPLED), K] fp32, see Hessian.doubt

    def rows(self, part: slice) -> Pull:
        """Give the part of some outputs, from a multiple of SAMPLED on."""
        start, stop = part.start or 0, part.stop
        return Pull(self.whole[part], self.doubt[start // SAMPLED : -(-stop // SAMPLED)])


class Hessian:
    """Running mean of ``x xᵀ`` over the tokens a layer sees (GPTQ, section 3: H = X Xᵀ).

    AutoGPTQ's Hessian is the same matrix times 2 * tokens / sequences; the solver's choices do
    not depend on that factor.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.tokens = 0
        self._is_lower = False  # of each stripe of `total`, only what is left of its end counts
        # Sums over two halves of the tokens: what is chance in one half, the other does not tell.
        self._drift: Tensor | None = None  # [2, size, size] of (exact x - x) xᵀ
        self._lack: Tensor | None = None  # [2, outputs, size] of lack xᵀ
        self._compared_tokens = 0

    def add(
        self,
        x: Tensor,  # [..., size] inputs of the layer
        keep: Tensor | None = None,  # [...] bool, False where x is padding
        exact: Tensor | None = None,  # [..., size] what x is in the full-precision model
        lack: Tensor | None = None,  # [..., outputs] more than that: what all outputs lack
    ) -> None:
        """Add the outer products of all kept tokens, summed in fp32."""
        rows = _rows(x, keep)
        self.tokens += rows.shape[0]
        if lack is not None:
            self._lack = _halves(self._lack, _rows(lack, keep), rows)
        elif exact is not None:
            # Numbers that near each other are subtracted without rounding.
            self._drift = _halves(self._drift, _rows(exact, keep) - rows, rows)
        if exact is not None or lack is not None:
            self._compared_tokens += rows.shape[0]
        if rows.is_cuda and rows.dtype.itemsize == _HALF:
            self._add_on_tensor_cores(rows)
        else:
            rows = rows.to(torch.float32)
            self.total.addmm_(rows.t(), rows)

    def _add_on_tensor_cores(self, rows: Tensor) -> None:
        """Multiply 16-bit numbers as they are: their products are exact in fp32.

        Only blocks on and below the diagonal are computed; :meth:`mean` mirrors them.
        """
        self._is_lower = True
        for stripe in self._stripes():
            part = self.total[stripe, : stripe.stop]
            left = rows[:, stripe].t()
            part += torch.mm(left, rows[:, : stripe.stop], out_dtype=torch.float32)

    def mean(self) -> Tensor:
        """Give ``[size, size]`` fp32: the mean over tokens, or zeros if none was seen."""
        if self._is_lower:
            for stripe in self._stripes():
                left = self.total[stripe, : stripe.start]
                self.total[: stripe.start, stripe] = left.t()
            self._is_lower = False
        return self.total / max(self.tokens, 1)

    def merge(self, other: Hessian) -> None:
        """Add another one's sums, in place."""
        self.total += other.total
        self.tokens += other.tokens
        self._is_lower |= other._is_lower
        self._compared_tokens += other._compared_tokens
        self._drift = _sum(self._drift, other._drift)
        self._lack = _sum(self._lack, other._lack)

    def sum_over(self, add_others: Callable[[Tensor], Any], with_pull: bool) -> None:
        """Add the sums of other processes.

        :param add_others: adds to a tensor, in place, that of all other processes
        """
        # A stripe and what is left of it on its side of the diagonal: little more than half of all.
        stripes = [self.total[stripe, : stripe.stop] for stripe in self._stripes()]
        sent = torch.cat([stripe.flatten() for stripe in stripes])
        add_others(sent)
        pieces = sent.split([stripe.numel() for stripe in stripes])
        for stripe, piece in zip(stripes, pieces, strict=True):
            stripe.copy_(piece.view_as(stripe))
        self._is_lower = True
        outputs = 0 if self._lack is None else self._lack.shape[1]
        numbers = [self.tokens, self._compared_tokens, outputs, outputs > 0]
        counts = torch.tensor(numbers, device=self.total.device)
        add_others(counts)
        self.tokens, self._compared_tokens, outputs, having = (int(count) for count in counts)
        if with_pull and self._compared_tokens:
            size = len(self.total)
            if having:  # any of them
                if self._lack is None:
                    self._lack = self.total.new_zeros(2, outputs // having, size)
                add_others(self._lack)
            else:
                if self._drift is None:
                    self._drift = self.total.new_zeros(2, size, size)
                add_others(self._drift)

    def _stripes(self) -> list[slice]:
        return _stripes(len(self.total), -(-len(self.total) // _STRIPE))

    @property
    def is_compared(self) -> bool:
        """Whether any token was seen in the full-precision model, too."""
        return self._compared_tokens > 0

    def pull(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Give ``[outputs, size]`` fp32, the mean of ``(wanted - W x) xᵀ`` over compared tokens.

        ``wanted - W x`` is what was said that the outputs lack, or else ``W (exact x - x)``.

        :param weight: ``[outputs, size]`` of all outputs
        :param rows: the outputs that are asked for
        """
        if self._lack is not None:
            pull = self._lack[:, rows].sum(0)
        else:
            assert self._drift is not None
            pull = weight[rows].to(torch.float32) @ self._drift.sum(0)
        return pull.div_(self._compared_tokens)

    def doubt(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Give the pull of one half of the tokens less the other's, of every SAMPLED-th output.

        :param rows: the outputs that are asked for, from a multiple of SAMPLED on
        """
        some = slice(rows.start, rows.stop, SAMPLED)
        if self._lack is not None:
            doubt = self._lack[0, some] - self._lack[1, some]
        else:
            assert self._drift is not None
            doubt = weight[some].to(torch.float32) @ (self._drift[0] - self._drift[1])
        return doubt.div_(self._compared_tokens)


def _stripes(size: int, count: int) -> list[slice]:
    """Part the rows of a symmetric matrix; of each stripe, what is on one side of it counts."""
    step = -(-size // count // _ALIGNED) * _ALIGNED
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one.add_(other)


def _halves(total: Tensor | None, left: Tensor, rows: Tensor) -> Tensor:
    """Add ``leftᵀ rows`` of the first and of the other half of the rows, summed in fp32."""
    if total is None:
        total = left.new_zeros(2, left.shape[1], rows.shape[1], dtype=torch.float32)
    middle = len(rows) // 2
    for half, part in zip(total, (slice(middle), slice(middle, None)), strict=True):
        if rows.is_cuda and rows.dtype.itemsize == _HALF:
            half.add_(torch.mm(left[part].t(), rows[part], out_dtype=torch.float32))
        else:
            half.addmm_(left[part].to(torch.float32).t(), rows[part].to(torch.float32))
    return total


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if keep is None else x[keep]


@dataclass(frozen=True)
class Factor:
    """Upper triangular ``inverse`` with ``inverseᵀ @ inverse = (H + damping)⁻¹``."""

    inverse: Tensor  # [K, K] fp32, contiguous, upper triangular
    damp_percent: float  # the damping that was needed

    def whiten(self, matrix: Tensor) -> Tensor:
        """Give ``matrix @ inverseᵀ`` ``[N, K]``, without most of what is multiplied by 0."""
        white = torch.empty_like(matrix)
        for stripe in _stripes(len(self.inverse), _HALF_STRIPES):
            later = slice(stripe.start, None)
            torch.mm(matrix[:, later], self.inverse[stripe, later].t(), out=white[:, stripe])
        return white

    def unwhiten(self, white: Tensor) -> Tensor:
        """Give ``white @ inverse`` ``[N, K]``: of what was whitened, ``matrix @ H⁻¹``."""
        matrix = torch.empty_like(white)
        for stripe in _stripes(len(self.inverse), _HALF_STRIPES):
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
        for stripe in _stripes(middle - part.start, _HALF_STRIPES):
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
