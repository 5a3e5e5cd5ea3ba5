"""``Quantizer`` and ``quantize`` with the interface that AutoGPTQ had: grids one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError


def quantize(x: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor | int) -> Tensor:
    """Round to a grid and back.

    A negative ``maxq`` stands for three values: 0, ``scale`` (from half of it on) and ``zero``
    (a negative number, from half of it down).
    """
    maxq = torch.as_tensor(maxq, device=x.device)
    if maxq < 0:
        return (x > scale / 2) * scale + (x < zero / 2) * zero
    codes = torch.clamp(torch.round(x / scale) + zero, torch.zeros_like(zero), maxq)
    return scale * (codes - zero)


class Quantizer(nn.Module):
    """The grid of one tensor; ``configure`` says of which kind, ``find_params`` fits it."""

    maxq: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, shape: int = 1) -> None:
        super().__init__()
        self.register_buffer("maxq", torch.tensor(0))
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero", torch.zeros(shape))
        self.bits = 0
        self.perchannel = False
        self.sym = True
        self.mse = False
        self.norm = 2.4
        self.grid = 100
        self.maxshrink = 0.8

    def configure(
        self,
        bits: int,
        perchannel: bool = False,
        sym: bool = True,
        mse: bool = False,
        norm: float = 2.4,
        grid: int = 100,
        maxshrink: float = 0.8,
        trits: bool = False,
    ) -> None:
        """Choose the kind of grid.

        :param perchannel: one scale per output row instead of one for the whole tensor
        :param mse: try ``maxshrink * grid`` smaller ranges, and keep the one whose rounding
            errors, to the power of ``norm``, add up to the least
        :param trits: three values instead of integers
        """
        self.bits, self.perchannel, self.sym = bits, perchannel, sym
        self.mse, self.norm, self.grid, self.maxshrink = mse, norm, grid, maxshrink
        self.maxq = torch.tensor(-1 if trits else 2**bits - 1, device=self.maxq.device)

    def find_params(
        self,
        x: Tensor,  # a weight [N, ...]; or activations of 2 to 4 dimensions
        weight: bool = False,
    ) -> None:
        """Fit scale and zero to a tensor.

        :raises ConfigError: (a ValueError) before ``configure``
        """
        if self.maxq == 0:
            raise ConfigError("The Quantizer has no width yet; call configure(bits=...) first.")
        self.maxq = self.maxq.to(x.device)
        rows = self._rows(x, weight)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        is_zero = (low == 0) & (high == 0)
        low, high = low.masked_fill(is_zero, -1), high.masked_fill(is_zero, 1)
        scale, zero = self._span(low, high)
        if self.mse:
            scale, zero = self._search(rows, low, high)
        if not self.perchannel:
            count = x.shape[0] if weight else x.shape[2 if x.dim() == 3 else 1]
            scale, zero = scale.repeat(count), zero.repeat(count)
        shape = _shape_of_grids(x, weight)
        self.scale, self.zero = scale.reshape(shape), zero.reshape(shape)

    def quantize(self, x: Tensor) -> Tensor:
        """Round a tensor to the grid; give it as it is while no grid was fitted."""
        return quantize(x, self.scale, self.zero, self.maxq) if self.ready() else x

    def enabled(self) -> bool:
        """Tell whether ``configure`` has chosen a width."""
        return bool(self.maxq > 0)

    def ready(self) -> bool:
        """Tell whether every scale can be divided by."""
        return bool((self.scale != 0).all())

    def _rows(self, x: Tensor, weight: bool) -> Tensor:
        """Lay what shares a scale in one row."""
        if not self.perchannel:
            return x.reshape(1, -1)
        if weight:
            return x.flatten(1)
        if x.dim() == 4:  # [B, channels, height, width]
            return x.transpose(0, 1).flatten(1)
        return x.reshape(-1, x.shape[-1]).t()

    def _span(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Lay the codes over a range."""
        if self.maxq < 0:
            return high, low
        scale = (high - low) / self.maxq
        if self.sym:
            return scale, torch.full_like(scale, float(self.maxq + 1) / 2)
        return scale, torch.round(-low / scale)

    def _search(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Choose, per row, among shrunk ranges."""
        scale, zero = self._span(low, high)
        best = torch.full_like(scale, torch.inf)
        for i in range(int(self.maxshrink * self.grid)):
            share = 1 - i / self.grid
            tried = self._span(share * low, share * high)
            rounded = quantize(rows, tried[0].unsqueeze(1), tried[1].unsqueeze(1), self.maxq)
            error = (rounded - rows).abs().pow(self.norm).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = (
                torch.where(better, n, o) for n, o in zip(tried, (scale, zero), strict=True)
            )
        return scale, zero


def _shape_of_grids(x: Tensor, weight: bool) -> tuple[int, ...]:
    """Give the shape in which one number per row broadcasts against the tensor."""
    if weight:
        return (-1, *[1] * (x.dim() - 1))
    return {4: (1, -1, 1, 1), 3: (1, 1, -1)}.get(x.dim(), (1, -1))
