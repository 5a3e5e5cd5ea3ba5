"""Scales and zero points, and the integers they give: ``weight ≈ scale * (code - zero)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The scale and zero point of a group, for every output row."""

    scale: Tensor  # [N] (or any shape that broadcasts against the weights)
    zero: Tensor  # [N] whole numbers, in fp32
    maxq: int  # the largest code

    def to_codes(self, weight: Tensor) -> Tensor:
        """Round weights to codes in ``[0, maxq]``, given as fp32."""
        return torch.clamp(torch.round(weight / self.scale) + self.zero, 0, self.maxq)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Give the weights that codes stand for."""
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class GridRule:
    """How a group of weights gets its scale and zero point."""

    bits: int
    symmetric: bool = True
    # Scales are rounded to the stored dtype *before* codes are chosen, so that what a reader
    # multiplies by is what the solver minimised for.
    scale_dtype: torch.dtype = torch.float16
    # The v1 format stores zero - 1; readers disagree about a stored -1, so zero 0 is never chosen.
    lowest_zero: int = 1

    @property
    def maxq(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    # Try negative scales too.  A symmetric grid has one level more below zero than above, and a
    # negative scale puts it where the larger weights are.  Asymmetric grids need no such help.
    signed: bool = False

    @property
    def factors(self) -> tuple[float, ...]:
        """Ranges to try, as shares of the min-max one, when looking for the least error.

        Negative: the same range with a negative scale.  A finer or wider list changes the error by
        less than 1 %.  8-bit grids stay min-max: nothing is gained there by cutting off large
        weights, nor by one level more.
        """
        if self.bits == 8:
            return (1.0,)
        shares = tuple(1 - i / 20 for i in range(-1, 11))
        return shares + tuple(-f for f in shares) if self.signed and self.symmetric else shares

    def part(self, lowest: Tensor, highest: Tensor, factor: float | Tensor) -> Grid:
        """Lay the codes over a share of the range [lowest, highest], mirrored if it is negative."""
        low, high = lowest * factor, highest * factor
        grid = self.span(torch.minimum(low, high), torch.maximum(low, high))
        return Grid(grid.scale if factor > 0 else -grid.scale, grid.zero, grid.maxq)

    def span(self, lowest: Tensor, highest: Tensor) -> Grid:
        """Lay the codes over ranges that include 0 (GPTQ, section 4).

        Symmetric: the larger absolute end on either side.
        """
        if self.symmetric:
            scale = self._storable(torch.maximum(-lowest, highest) * (2 / self.maxq))
            return Grid(scale, torch.full_like(scale, (self.maxq + 1) // 2), self.maxq)
        # With zero >= z the codes reach down to -z * scale and up to (maxq - z) * scale.
        low = self.lowest_zero
        scale = torch.maximum((highest - lowest) / self.maxq, highest / (self.maxq - low))
        scale = self._storable(scale)
        return Grid(scale, torch.round(-lowest / scale).clamp(low, self.maxq), self.maxq)

    def _storable(self, scale: Tensor) -> Tensor:
        """Round to the stored dtype; a group of zeros gets scale 1, so that nobody divides by 0."""
        info = torch.finfo(self.scale_dtype)
        smallest = info.smallest_normal * info.eps  # the smallest subnormal number
        scale = torch.where(scale > 0, scale.clamp(smallest, info.max), 1.0)
        return scale.to(self.scale_dtype).to(torch.float32)
