"""Write safetensors files: the same tensors always give the same bytes.

The library's own writer orders the metadata at random, and wants all tensors in memory at once.
A file is the length of the header (8 bytes, little-endian), the header (JSON, filled up with spaces
to a multiple of 8) and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written, computed only when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Outgoing:
        """Write a tensor as it is, from whatever device it is on."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def get(self) -> Tensor:
        """Give the tensor's values on the CPU, in one piece and without a graph."""
        tensor = self.make().detach().cpu().contiguous()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise AssertionError(f"announced {self}, got {tensor.dtype} {list(tensor.shape)}")
        return tensor


def write_file(path: Path, tensors: Mapping[str, Outgoing], metadata: Mapping[str, str]) -> None:
    """Write one file; no more than one tensor is held in memory at a time."""
    # Wide numbers first, so that each tensor starts at a multiple of its numbers' width.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            # As bytes: NumPy does not know bfloat16.
            file.write(tensors[name].get().reshape(-1).view(torch.uint8).numpy().data)
