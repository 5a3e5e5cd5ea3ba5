"""Put parts of a model where they run, and back to where the user had them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def execution_device(model: nn.Module) -> torch.device:
    """Give the device to quantize on: the model's own, unless that is the CPU beside a GPU."""
    own = next(model.parameters()).device
    return torch.device("cuda:0") if own.type == "cpu" and torch.cuda.is_available() else own


def execution_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Give the dtype blocks run in: the model's on a GPU, fp32 on a CPU.

    CPUs multiply 16-bit numbers several times slower than 32-bit ones.
    """
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


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
        for owner in owners:
            for tensor in _own_tensors(owner):
                if id(tensor) in homes:
                    home, kept = homes[id(tensor)]
                    tensor.data = tensor.data.to(home, kept)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def _narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
