"""Put parts of a model where they run, and back to where the user had them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint.blocks import DiskWeights


def execution_device(model: nn.Module) -> torch.device:
    """Give the device to quantize on: the model's own, unless that is the CPU beside a GPU."""
    own = next(model.parameters()).device
    if own.type in ("cpu", "meta"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return own


def execution_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Give the dtype blocks run in: the model's on a GPU, fp32 on a CPU.

    CPUs multiply 16-bit numbers several times slower than 32-bit ones.
    """
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


@dataclass(frozen=True)
class Workplace:
    """Where and in what precision a model's parts run, and whether they lie on disk meanwhile."""

    device: torch.device
    dtype: torch.dtype
    disk: DiskWeights | None = None

    @contextmanager
    def holds(
        self,
        module: nn.Module,
        name: str,  # its dotted name in the model; "" for the model itself
        without: nn.Module | None = None,
    ) -> Iterator[None]:
        """Have a part of the model there; ``without`` a part of that, which stays away."""
        with ExitStack() as context:
            if self.disk is not None:
                context.enter_context(self.disk.loaded(module, name, self.device, without))
            context.enter_context(placed(module, self.device, self.dtype, without))
            yield


@contextmanager
def placed(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    without: nn.Module | None = None,
) -> Iterator[None]:
    """Move a module to where it runs; afterwards put back what is still there.

    :param without: a part that stays where it is
    """
    excluded = set(without.modules()) if without is not None else set()
    owners = [module for module in model.modules() if module not in excluded]
    homes: dict[int, tuple[torch.device, torch.dtype]] = {}
    for owner in owners:
        for tensor in _own_tensors(owner):
            homes.setdefault(id(tensor), (tensor.device, tensor.dtype))
            widened = dtype if _narrower(tensor, dtype) else tensor.dtype
            tensor.data = tensor.data.to(device, widened)
    try:
        yield
    finally:
        present = set(model.modules())
        for owner in owners:
            if owner in present:  # quantized linears have gone, and their successors are not owners
                for tensor in _own_tensors(owner):
                    if id(tensor) in homes:
                        home, kept = homes[id(tensor)]
                        tensor.data = tensor.data.to(home, kept)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and not tensor.is_meta:
            yield tensor


def _narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
