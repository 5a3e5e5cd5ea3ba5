"""Which kernels can compute with a weight: a table, and the reason of every refusal.

Capability decides here, once per weight, in which layout it lies. Which of the kernels over that
layout runs is decided by shape, inside the operator (csrc/cuda/q_matmul.cu).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.tiles import find_obstacle
from . import native, self_test

logger = logging.getLogger(__name__)


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
    triton: bool = False  # whether Triton compiles it
    step: int = 16  # what the group size must be a multiple of, in tiles

    def refusal(self, weight: Weight) -> str | None:
        """Say why this kernel cannot serve a weight, or None if it can."""
        return next(self._refusals(weight), None)

    def _refusals(self, weight: Weight) -> Iterator[str]:
        if self.device not in (None, weight.device.type):
            yield f"the weight is on {weight.device}, not on {self.device}"
        if self.layout == "tiles":
            yield from self._refusals_of_tiles(weight)
        if self.native and not native.load():
            yield native.reason()
        if self.triton and _triton_failure() is not None:
            yield str(_triton_failure())
        if self.capability is not None:
            yield from _gpu_refusals(weight.device, self.capability)
        if self.layout == "tiles":
            wrong = self_test.failure(weight.device, weight.bits)
            if wrong is not None:
                yield f"its self-test fails: {wrong}"

    def _refusals_of_tiles(self, weight: Weight) -> Iterator[str]:
        obstacle = weight.unfit or find_obstacle(weight.bits, weight.group_size)
        if obstacle is not None:
            yield obstacle
        if weight.group_size != -1 and weight.group_size % self.step:
            yield f"group_size is {weight.group_size}, which is not a multiple of {self.step}"


def _gpu_refusals(device: torch.device, capability: tuple[int, int]) -> Iterator[str]:
    if torch.version.cuda is None:
        yield "this torch is not built for CUDA"
    if not native.has_cuda():
        yield "auto_gptq/_native.so was built without nvcc and has no CUDA kernels"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        yield "{} is sm_{}{}, older than sm_{}{}".format(device, *found, *capability)


# The first that serves a weight is taken.
KERNELS = (
    Kernel("cuda", "tiles", "cuda", capability=(7, 5), native=True),
    Kernel("triton", "tiles", "cuda", triton=True),
    Kernel("cpu", "tiles", "cpu", native=True, step=32),
    Kernel("cpu-fp32", "gptq", "cpu", native=True),
    Kernel("torch", "gptq", None),
)


@functools.cache
def _triton_failure() -> str | None:
    """Register the Triton kernels, which then serve all of torch's CUDA and ROCm devices."""
    if native.has_cuda():
        return "auto_gptq/_native.so serves the CUDA devices"
    try:
        from . import triton_ops
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    triton_ops.register()
    return None


def choose(weight: Weight) -> Kernel:
    """Take the first kernel that can serve a weight; plain torch serves each, and is warned of."""
    kernel = next(kernel for kernel in KERNELS if kernel.refusal(weight) is None)
    if kernel is KERNELS[-1]:
        _warn_once(weight.device.type, explain(weight))
    return kernel


@functools.cache
def _warn_once(device: str, why: str) -> None:
    logger.warning("Quantized layers on %s run on plain torch, which is slow:\n%s", device, why)


def explain(weight: Weight) -> str:
    """Say which kernel serves a weight, and why each one before it does not."""
    lines = []
    for kernel in KERNELS:
        refusal = kernel.refusal(weight)
        lines.append(f"{kernel.name}: {refusal or 'runs'}")
        if refusal is None:
            break
    return "\n".join(lines)
