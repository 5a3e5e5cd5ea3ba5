"""Linears that read the same input, computed as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]


def product(linears: Sequence[nn.Module]) -> Product:
    """Give the function that multiplies an input by all these weights, results side by side."""
    if len(linears) == 1:
        return linears[0]

    def apart(x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in linears], -1)

    return apart
