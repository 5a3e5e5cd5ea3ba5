"""The Hessian of a layer's inputs, and how far its outputs are from the full-precision model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        # When the comparison is there, where that is summed on another stream than pull() runs on.
        self.compared: torch.cuda.Event | None = None

    def add(
        self,
        x: Tensor,  # [..., size] inputs of the layer
        keep: Tensor | None = None,  # [...] bool, False where x is padding
    ) -> None:
        """Add the outer products of all kept tokens, summed in fp32."""
        rows = _rows(x, keep)
        self.tokens += rows.shape[0]
        if rows.is_cuda and rows.dtype.itemsize == _HALF:
            self._add_on_tensor_cores(rows)
        else:
            rows = rows.to(torch.float32)
            self.total.addmm_(rows.t(), rows)

    def compare(
        self,
        x: Tensor,  # [..., size] inputs of the layer
        keep: Tensor | None,  # [...] bool, False where x is padding
        exact: Tensor,  # [..., size] what x is in the full-precision model
        lack: Tensor | None = None,  # [..., outputs] more than that: what all outputs lack
    ) -> None:
        """Add what the full-precision model does otherwise on all kept tokens."""
        rows = _rows(x, keep)
        self._compared_tokens += rows.shape[0]
        if lack is not None:
            self._lack = _halves(self._lack, _rows(lack, keep), rows)
        else:
            # Numbers that near each other are subtracted without rounding.
            self._drift = _halves(self._drift, _rows(exact, keep) - rows, rows)

    def _wait_for_comparison(self) -> None:
        if self.compared is not None:
            self.compared.wait(torch.cuda.current_stream(self.total.device))

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
            self._wait_for_comparison()
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
        return stripes(len(self.total), -(-len(self.total) // _STRIPE))

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
        self._wait_for_comparison()
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
        self._wait_for_comparison()
        some = slice(rows.start, rows.stop, SAMPLED)
        if self._lack is not None:
            doubt = self._lack[0, some] - self._lack[1, some]
        else:
            assert self._drift is not None
            doubt = weight[some].to(torch.float32) @ (self._drift[0] - self._drift[1])
        return doubt.div_(self._compared_tokens)


def stripes(size: int, count: int) -> list[slice]:
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
