"""Find a checkpoint's weight files and read tensors out of them."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import hub
from ..errors import CheckpointError, MissingFileError
from .safetensors_file import DTYPES

_SAFETENSORS = ".safetensors"
_INDEX = ".index.json"
# What torch.load raised for files with bytes changed at random: it interprets what it reads.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights."""

    files: Sequence[Path]
    base_name: str  # file name without its extension


def find_weights(
    source: str | Path, base_names: Sequence[str], extensions: Sequence[str], **kwargs: Any
) -> WeightFiles:
    """Find the weights of a folder or Hub repository: sharded first, then a single file.

    :param base_names: file names without extension, in the order of trying
    :param extensions: like ".safetensors", in the order of trying
    :raises MissingFileError: (a FileNotFoundError) listing all names tried
    :raises CheckpointError: if an index is damaged or leads out of the folder
    """
    tried = []
    for extension in extensions:
        for base in base_names:
            for name in (f"{base}{extension}{_INDEX}", f"{base}{extension}"):
                tried.append(name)
                path = hub.find_file(source, name, **kwargs)
                if path is None:
                    continue
                if name.endswith(_INDEX):
                    return WeightFiles(_shards(source, path, **kwargs), base)
                return WeightFiles([path], base)
    raise MissingFileError(
        f"{source} holds no weights under any of these names: {', '.join(tried)}. "
        "Pass model_basename= if the file is called otherwise."
    )


def _shards(source: str | Path, index: Path, **kwargs: Any) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights ({error!r}).") from None
    shards = []
    for name in names:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name:
            raise CheckpointError(f"{index} names {name!r}, a file outside of the checkpoint.")
        path = hub.find_file(source, name, **kwargs)
        if path is None:
            raise MissingFileError(
                f"{index} names the file {name}, which is missing. Copy or download it again."
            )
        shards.append(path)
    return shards


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before its values are read."""

    shape: list[int]
    dtype: torch.dtype | None  # None: one that torch does not have
    file: Path


def read_headers(weights: WeightFiles) -> dict[str, Header]:
    """Give shape and dtype of every tensor without reading its values.

    :raises CheckpointError: if a file is damaged, or two files hold tensors of the same name
    """
    headers: dict[str, Header] = {}
    for file in weights.files:
        for name, header in _file_headers(file):
            if name in headers:
                raise CheckpointError(
                    f"{name} lies in two files, {headers[name].file.name} and {file.name}; "
                    "the shards do not belong together."
                )
            headers[name] = header
    return headers


def read_tensors(weights: WeightFiles, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of these names, on the CPU, file by file."""
    for file in weights.files:
        if file.suffix == _SAFETENSORS:
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name in names:
                        yield name, opened.get_tensor(name)
        else:
            for name, tensor in _unpickled(file).items():
                if name in names:
                    yield name, tensor.clone()  # the model must not hang on the mapped file


def _file_headers(file: Path) -> Iterator[tuple[str, Header]]:
    if file.suffix == _SAFETENSORS:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                yield name, Header(list(part.get_shape()), DTYPES.get(part.get_dtype()), file)
    else:
        for name, tensor in _unpickled(file).items():
            yield name, Header(list(tensor.shape), tensor.dtype, file)


_POINTER = b"version https://git-lfs"  # what Git leaves in place of large files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise MissingFileError(f"{file} is missing. Copy or download it again.") from None
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"{file} is a pointer of Git LFS, not the file itself. Fetch that with "
                    "`git lfs pull`, or download it again."
                ) from None
        raise CheckpointError(
            f"{file} cannot be read: it is truncated or not a safetensors file ({error}). "
            "Copy or download it again."
        ) from None


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    """Read a legacy file; only tensors are ever unpickled."""
    try:
        # Mapped where the file's form allows it, so that headers come without the values.
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except _UNPICKLING_ERRORS as error:
        raise CheckpointError(
            f"{file} cannot be read safely: it is damaged or holds more than tensors ({error})."
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not named tensors.")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
