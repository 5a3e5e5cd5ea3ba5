"""A model whose weights stay in files: a part of it is read when its turn comes, and dropped again.

The model lies on torch's meta device: names, shapes and dtypes without values.  Files are read with
plain reads, not mapped, so that memory in use is memory that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, MissingFileError
from .fill import some, tied_names
from .reader import WeightFiles
from .safetensors_file import DTYPES, Outgoing

_META = torch.device("meta")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and what it is given as."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the file
    given: torch.dtype

    def read(self, most: int | None = None) -> Tensor:
        """Give the tensor on the CPU, or its first ``most`` numbers, flat.

        :raises MissingFileError: (a FileNotFoundError) if the file is gone
        :raises CheckpointError: if it has become shorter
        """
        count = torch.Size(self.shape).numel()
        shape = self.shape if most is None else (min(most, count),)
        tensor = torch.empty(shape, dtype=self.dtype)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                read = file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        except FileNotFoundError:
            raise MissingFileError(
                f"{self.file} is gone. Put it back; a quantization with a work_dir then goes on "
                "where it was."
            ) from None
        if read != tensor.nbytes:
            raise CheckpointError(
                f"{self.file} ends in the midst of a tensor. Copy or download it again."
            )
        return tensor.to(self.given)


class DiskWeights:
    """Where every tensor of a model lies on disk."""

    def __init__(self, model: nn.Module, weights: WeightFiles, dtype: torch.dtype) -> None:
        """Find a place for each of the model's parameters.

        :param dtype: what floating numbers are given as
        :raises CheckpointError: naming parameters without one, or of another shape
        """
        self._places: dict[str, Place] = {}
        found = {n: p for file in weights.files for n, p in _read_places(file, dtype).items()}
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        tied = tied_names(model)
        missing = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            twins = tied.get(name, {name})
            # Some checkpoints hold the base model alone, whose names lack its prefix.
            names = [n for twin in twins for n in (twin, twin.removeprefix(prefix), prefix + twin)]
            place = next((found[n] for n in (name, *names) if n in found), None)
            if place is not None:
                _check_shape(name, tensor, place)
                self._places[name] = place
            elif tensor.is_meta:
                missing.append(name)
        if missing:
            raise CheckpointError(
                f"The files in {weights.files[0].parent} lack {len(missing)} tensors of the model: "
                f"{some(missing)}. If transformers renames or joins tensors of this kind of model "
                "while it loads them, load it without device_map='disk'."
            )

    @contextmanager
    def loaded(
        self,
        module: nn.Module,
        name: str,  # its dotted name in the model; "" for the model itself
        device: torch.device,
        without: nn.Module | None = None,
    ) -> Iterator[None]:
        """Hold a module's tensors in memory for as long as the context lasts.

        :param without: a part that stays on disk
        """
        excluded = set(without.modules()) if without is not None else set()
        replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        read: dict[int, Tensor] = {}  # by the meta tensor's id: tied ones are read once
        try:
            for path, owner in module.named_modules():
                if owner in excluded:
                    continue
                for tensors in (owner._parameters, owner._buffers):
                    for leaf, tensor in tensors.items():
                        place = self._places.get(".".join(p for p in (name, path, leaf) if p))
                        if tensor is None or place is None or not tensor.is_meta:
                            continue
                        if id(tensor) not in read:
                            read[id(tensor)] = _like(tensor, place.read().to(device))
                        replaced.append((tensors, leaf, tensor))
                        tensors[leaf] = read[id(tensor)]
            yield
        finally:
            for tensors, leaf, tensor in replaced:
                tensors[leaf] = tensor

    def move(self, module: nn.Module, name: str, file: Path) -> None:
        """Take a module's tensors from now on from another file, and drop them from memory.

        :param file: safetensors with the module's ``state_dict`` by full names
        """
        found = _read_places(file, None)
        for leaf, tensor in module.state_dict(keep_vars=True).items():
            full = f"{name}.{leaf}"
            self._places[full] = found[full]
            module._buffers[leaf] = tensor.to(_META)
        for leaf in ("weight", "bias"):  # those of the dense linear that was here
            if leaf not in module._buffers:
                self._places.pop(f"{name}.{leaf}", None)

    def head(self, name: str, count: int) -> Tensor:
        """Give the first numbers of a tensor, flat."""
        return self._places[name].read(count)

    def outgoing(self, name: str) -> Outgoing:
        """Write a tensor as it is given, read when its turn comes."""
        place = self._places[name]
        return Outgoing(place.given, place.shape, partial(_read, place))


def _read(place: Place) -> Tensor:
    return place.read()


def _like(meta: Tensor, tensor: Tensor) -> Tensor:
    """Make a Parameter where there was one."""
    if isinstance(meta, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=meta.requires_grad and tensor.is_floating_point())
    return tensor


def _check_shape(name: str, tensor: Tensor, place: Place) -> None:
    if tuple(tensor.shape) != place.shape:
        raise CheckpointError(
            f"{name} has shape {list(place.shape)} in {place.file}, but the model's configuration "
            f"asks for {list(tensor.shape)}."
        )


def _read_places(file: Path, dtype: torch.dtype | None) -> dict[str, Place]:
    """Read a safetensors header.

    :param dtype: what floating numbers are given as; None for as they are
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            stored = DTYPES[entry["dtype"]]
            given = dtype if dtype is not None and stored.is_floating_point else stored
            start = 8 + length + entry["data_offsets"][0]
            places[name] = Place(file, start, tuple(entry["shape"]), stored, given)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file} cannot be read: it is truncated or not a safetensors file ({error!r}). "
            "Copy or download it again."
        ) from None
    return places
