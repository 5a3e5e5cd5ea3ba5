"""Which kernels can compute with a weight: a table, and the reason of every refusal.

Capability decides here, once per weight, in which layout it lies. Which of the kernels over that
layout runs is decided by shape, inside the operator (csrc/cuda/q_matmul.cu).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.tiles import find_obstacle
from . import native


@dataclass(frozen=True)
class Weight:
    """What decides about the kernel for a weight."""

    device: torch.device
    bits: int
    group_size: int  # -1 for one group
    unfit: str | None = None  # why it cannot be laid out in tiles, where that is known


@dataclass(frozen=True)
class Kernel:
    """A layout and the operator that multiplies by weights in it."""

    name: str
    layout: str  # "tiles" (formats/tiles.py) or "gptq", the checkpoint's own
    device: str | None  # a type of device; None for each
    capability: tuple[int, int] | None = None  # the least, of an NVIDIA GPU
    native: bool = False  # whether it lies in auto_gptq/_native.so

    def refusal(self, weight: Weight) -> str | None:
        """Say why this kernel cannot serve a weight, or None if it can."""
        return next(self._refusals(weight), None)

    def _refusals(self, weight: Weight) -> Iterator[str]:
        if self.device not in (None, weight.device.type):
            yield f"the weight is on {weight.device}, not on {self.device}"
        if self.layout == "tiles":
            obstacle = weight.unfit or find_obstacle(weight.bits, weight.group_size)
            if obstacle is not None:
                yield obstacle
        if self.native and not native.load():
            yield native.reason()
        if self.capability is not None:
            if torch.version.cuda is None:
                yield "this torch is not built for CUDA"
            if not native.has_cuda():
                yield "auto_gptq/_native.so was built without nvcc and has no CUDA kernels"
            found = torch.cuda.get_device_capability(weight.device)
            if found < self.capability:
                needed = "sm_{}{}".format(*self.capability)
                yield "{} is sm_{}{}, older than {}".format(weight.device, *found, needed)


# The first that serves a weight is taken.
KERNELS = (
    Kernel("cuda", "tiles", "cuda", capability=(7, 5), native=True),
    Kernel("cpu", "gptq", "cpu", native=True),
    Kernel("torch", "gptq", None),
)


def choose(weight: Weight) -> Kernel:
    """Take the first kernel that can serve a weight; plain torch serves each."""
    return next(kernel for kernel in KERNELS if kernel.refusal(weight) is None)


def explain(weight: Weight) -> str:
    """Say which kernel serves a weight, and why each one before it does not."""
    lines = []
    for kernel in KERNELS:
        refusal = kernel.refusal(weight)
        lines.append(f"{kernel.name}: {refusal or 'runs'}")
        if refusal is None:
            break
    return "\n".join(lines)
