"""The full-precision weights of a block that is being quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class Originals:
    """Copies of the weights of some linears, which can take their places for a while.

    A quantized model's hidden states wander away from those of the full-precision model.  To see
    how far, batches run through each block in both ways, and the weights are exchanged in between.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._kept: list[tuple[nn.Module, Tensor]] = [
            (linear, _data(linear).clone()) for linear in linears.values()
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the block be the full-precision one."""
        now = [_data(linear) for linear, _ in self._kept]
        try:
            for linear, original in self._kept:
                linear.weight.data = original
            yield
        finally:
            for (linear, _), data in zip(self._kept, now, strict=True):
                linear.weight.data = data


def _data(linear: nn.Module) -> Tensor:
    data: Tensor = linear.weight.data  # type: ignore[assignment]
    return data
