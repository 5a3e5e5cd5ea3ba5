"""The hidden states between two blocks: on the device, in the host's memory or on disk."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericsError
from .memory import free_bytes

logger = logging.getLogger(__name__)

# Shares of the free memory that hidden states may take: blocks, Hessians and the activations in
# the midst of a block need the rest.
_SHARE_OF_DEVICE = 0.3
_SHARE_OF_HOST = 0.5
HOMES = ("device", "host", "disk")


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file of its own, without a header."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as file:
            file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor


class Activations:
    """One tensor ``[B, T, hidden size]`` per batch, given on the device whatever its home.

    The home is chosen when the first tensor comes, by how much memory is free then.

    :param rows: tokens of all batches together, padding included
    :param home: one of :data:`HOMES`, or None to choose
    :param folder: where files go; None for a temporary folder
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        *,
        home: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.home = home
        self._rows = rows
        self._folder = folder
        self._own_folder: Path | None = None  # made here, so removed here
        self._kept: list[Tensor | _OnDisk] = []
        self._sums: list[Tensor] = []  # of each tensor, on the device: no waiting

    @classmethod
    def none(cls) -> Activations:
        """Give an empty one."""
        return cls(torch.device("cpu"), torch.float32, 0, home="device")

    def first(self, tokens: int) -> Activations:
        """Copy the first batches, of so many tokens, but one batch at least."""
        part = Activations(self.device, self.dtype, tokens, folder=self._folder)
        held = 0
        for tensor in self:
            held += tensor.shape[:-1].numel()
            if held > tokens and len(part):
                break
            part.append(tensor)
        return part

    def copy(self) -> Activations:
        """Copy all; what is on the device is shared until one of both takes another tensor."""
        return self.first(self._rows)

    def append(self, tensor: Tensor) -> None:
        """Add the hidden states of the next batch."""
        self._kept.append(self._put(len(self._kept), tensor))
        self._sums.append(tensor.sum(dtype=torch.float32))

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        tensor = kept.read() if isinstance(kept, _OnDisk) else kept
        return tensor.to(self.device, non_blocking=True)

    def __setitem__(self, index: int | slice, value: Tensor | Sequence[Tensor]) -> None:
        if isinstance(index, slice):
            for i, tensor in zip(range(len(self))[index], value, strict=True):
                self[i] = tensor
            return
        assert isinstance(value, Tensor)
        self._kept[index] = self._put(index, value)
        self._sums[index] = value.sum(dtype=torch.float32)

    def check_finite(self, who: str) -> None:
        """Look at what all tensors held when they came.

        :raises NumericsError: naming the first batch with NaN or infinity
        """
        # A sum is finite only if all terms are; one that overflows decides nothing.
        finite = torch.isfinite(torch.stack(self._sums)).tolist() if self._sums else []
        doubtful = (batch for batch, sure in enumerate(finite) if not sure)
        batch = next((i for i in doubtful if not torch.isfinite(self[i]).all()), None)
        if batch is None:
            return
        kept = self[batch]
        kind = "NaN" if torch.isnan(kept).any() else "infinity"
        if self.dtype == torch.float16:
            hint = (
                "float16 ends at 65504; load the model with torch_dtype=torch.bfloat16 "
                "or torch.float32."
            )
        else:
            hint = "Are the model's weights intact?"
        raise NumericsError(f"{who} hold {kind} in calibration batch {batch}. {hint}")

    def close(self) -> None:
        """Forget all tensors and remove their files."""
        for kept in self._kept:
            if isinstance(kept, _OnDisk):
                kept.file.unlink(missing_ok=True)
        self._kept.clear()
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def _put(self, index: int, tensor: Tensor) -> Tensor | _OnDisk:
        tensor = tensor.detach().to(self.dtype)
        if self.home is None:
            self.home = self._choose(self._rows * tensor.shape[-1] * tensor.element_size())
        if self.home == "device":
            return tensor.to(self.device)
        if self.home == "host":
            old = self._kept[index] if index < len(self._kept) else None
            if not isinstance(old, Tensor) or old.shape != tensor.shape:
                old = torch.empty(tensor.shape, dtype=self.dtype, pin_memory=tensor.is_cuda)
            return old.copy_(tensor)
        return self._write(index, tensor.cpu().contiguous())

    def _choose(self, needed: int) -> str:
        if needed <= _SHARE_OF_DEVICE * free_bytes(self.device):
            home = "device"
        elif self.device.type != "cpu" and needed <= _SHARE_OF_HOST * free_bytes(
            torch.device("cpu")
        ):
            home = "host"
        else:
            home = "disk"
        place = {"device": str(self.device), "host": "pinned host memory", "disk": "disk"}[home]
        logger.info(
            "Hidden states of %d tokens take %.2f GB; they are kept on %s.",
            self._rows,
            needed / 1e9,
            place,
        )
        return home

    def _write(self, index: int, tensor: Tensor) -> _OnDisk:
        if self._own_folder is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._own_folder = Path(tempfile.mkdtemp(prefix=".activations-", dir=self._folder))
        file = self._own_folder / f"{index:06}"
        with file.open("wb") as opened:
            opened.write(tensor.view(-1).view(torch.uint8).numpy().data)
        return _OnDisk(file, tensor.shape, tensor.dtype)
