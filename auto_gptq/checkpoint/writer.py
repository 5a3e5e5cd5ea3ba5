"""Write a checkpoint so that under its final names there is always a whole one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, StorageError
from .safetensors_file import Outgoing, write_file

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_INDEX = ".index.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Files:
    """What kind of weight files to write.

    :param max_shard_size: bytes, or like "2GB" or "2GiB"; None for one file
    :raises ConfigError: if it is none of these
    """

    use_safetensors: bool = True
    max_shard_size: int | str | None = None

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)

    @property
    def extension(self) -> str:
        """How the files' names end."""
        return ".safetensors" if self.use_safetensors else ".bin"


def check_folder(folder: Path) -> None:
    """Refuse a file where a folder to write into is wanted."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder to write into.")


@contextmanager
def staged(folder: Path, replaces: str = "") -> Iterator[Path]:
    """Give an empty folder whose files move into ``folder`` when the block ends well.

    Each file is renamed into place, in the order of names given by ``sorted`` with JSON files
    last, so that an index never names a file that is not there.  After an error nothing is left.

    :param replaces: pattern of the names of an older checkpoint's files, which are then removed
        where no new file has taken their name: a left-over index would lead to old shards
    :raises StorageError: (an OSError) if the disk is full
    """
    check_folder(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield stage
        new = sorted(stage.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
        for path in new:
            _flush(path)
        for path in new:
            path.replace(folder / path.name)
        _flush(folder)
        names = {path.name for path in new}
        old = [p for p in folder.iterdir() if re.fullmatch(replaces, p.name) and p.is_file()]
        for path in sorted(old, key=lambda path: path.suffix != ".json"):  # indexes first
            if path.name not in names:
                path.unlink()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"There is no room to write into {folder} ({error.strerror}; "
            f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free). Nothing there has changed. "
            "Make room and call again; with a work_dir, finished blocks are not solved again."
        ) from error
    finally:
        shutil.rmtree(stage)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def file_pattern(base_name: str, files: Files) -> str:
    """Give the pattern of all names under which weights of this base name are written."""
    extension = re.escape(files.extension)
    pattern = rf"{re.escape(base_name)}(-\d{{5}}-of-\d{{5}})?{extension}(\.index\.json)?"
    return rf"{pattern}|model\.safetensors\.index\.json" if files.use_safetensors else pattern


def write_weights(
    tensors: Mapping[str, Outgoing],
    folder: Path,
    base_name: str,
    *,
    metadata: Mapping[str, str],
    files: Files,
) -> None:
    """Write named tensors as one file, or as shards of at most some size with an index.

    transformers opens ``model.safetensors`` or what ``model.safetensors.index.json`` lists, so an
    index of that name lets it find a file called ``gptq_model-4bit-128g.safetensors``.
    """
    extension = files.extension
    shards = _shards(tensors, parse_size(files.max_shard_size))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        part = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{base_name}{part}{extension}"
        shard = {name: tensors[name] for name in names}
        if files.use_safetensors:
            write_file(path, shard, metadata)
        else:
            # Cloned: a view would drag its whole storage into the file.
            torch.save({name: tensor.get().clone() for name, tensor in shard.items()}, path)
        weight_map |= dict.fromkeys(names, path.name)
    indexed = [f"{base_name}{extension}"] if len(shards) > 1 else []
    if files.use_safetensors and base_name != "model":
        indexed.append("model.safetensors")
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    for name in indexed:
        (folder / f"{name}{_INDEX}").write_text(json.dumps(index, indent=2), encoding="utf-8")


def parse_size(size: int | str | None) -> int | None:
    """Read a size in bytes as transformers does: "2GB" is 2 * 10**9 bytes, "2GiB" 2 * 2**30.

    :raises ConfigError: if it is neither that nor a positive whole number
    """
    if size is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", str(size).strip().upper())
    unit = 1 if found is None or not found[2] else _UNITS.get(found[2], 0)
    number = 0 if found is None or isinstance(size, bool) else int(float(found[1]) * unit)
    if number < 1:
        raise ConfigError(
            f"max_shard_size is {size!r}; it must be a number of bytes or like '2GB' or '500MiB'."
        )
    return number


def _shards(tensors: Mapping[str, Outgoing], most: int | None) -> list[list[str]]:
    """Fill shards in the order of the tensors; one larger than ``most`` gets its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if most is not None and shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
