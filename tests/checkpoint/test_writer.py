"""Shards, sizes, and what becomes of an older checkpoint in the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq.checkpoint.reader import find_weights, read_headers, read_tensors
from auto_gptq.checkpoint.safetensors_file import Outgoing
from auto_gptq.checkpoint.writer import Files, file_pattern, parse_size, staged, write_weights
from auto_gptq.errors import ConfigError

TENSORS = {name: torch.full((25,), float(i)) for i, name in enumerate("cabd")}  # 100 bytes each


def _save(folder: Path, base: str = "weights", **files: Any) -> list[str]:
    form = Files(**files)
    with staged(folder, replaces=file_pattern(base, form)) as stage:
        outgoing = {name: Outgoing.of(tensor) for name, tensor in TENSORS.items()}
        write_weights(outgoing, stage, base, metadata={"format": "pt"}, files=form)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, None),
        (123, 123),
        ("123", 123),
        ("2GB", 2 * 10**9),
        ("2 gib", 2 * 2**30),
        ("1.5MB", 1_500_000),
        ("10KiB", 10240),
    ],
)
def test_sizes_mean_what_they_do_in_transformers(size: Any, expected: int | None) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "2XB", 0, -1, "0", True, "1e3"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match=f"max_shard_size is {size!r}"):
        parse_size(size)


@pytest.mark.parametrize("use_safetensors", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("size", "counts"), [(100, [1, 1, 1, 1]), (299, [2, 2]), (10, [1] * 4)])
def test_shards_are_read_back(
    use_safetensors: bool, size: int, counts: list[int], tmp_path: Path
) -> None:
    _save(tmp_path, use_safetensors=use_safetensors, max_shard_size=size)
    extension = Files(use_safetensors).extension
    index = json.loads((tmp_path / f"weights{extension}.index.json").read_text())
    assert index["metadata"] == {"total_size": 400}
    parts = [f"weights-{i:05d}-of-{len(counts):05d}{extension}" for i in range(1, len(counts) + 1)]
    placed = [list(index["weight_map"].values()).count(part) for part in parts]
    assert placed == counts
    weights = find_weights(tmp_path, ["weights"], [extension])
    assert [file.name for file in weights.files] == parts
    assert set(read_headers(weights)) == set(TENSORS)
    found = dict(read_tensors(weights, {"a", "d"}))
    assert {name: float(tensor[0]) for name, tensor in found.items()} == {"a": 1, "d": 3}


def test_one_file_is_enough_where_all_fits(tmp_path: Path) -> None:
    names = ["model.safetensors.index.json", "weights.safetensors"]
    assert _save(tmp_path, max_shard_size="1KB") == names
    assert _save(tmp_path / "model", base="model") == ["model.safetensors"]


def test_the_files_of_an_older_checkpoint_go(tmp_path: Path) -> None:
    """A left-over index is tried before a single file, and would load the old shards."""
    (tmp_path / "notes.safetensors.txt").write_text("mine")
    (tmp_path / "other.safetensors").write_text("mine")
    kept = ["model.safetensors.index.json", "notes.safetensors.txt", "other.safetensors"]
    _save(tmp_path, max_shard_size=100)
    two = [f"weights-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert _save(tmp_path, max_shard_size=200) == [*kept, *two, "weights.safetensors.index.json"]
    assert _save(tmp_path) == [*kept, "weights.safetensors"]
    assert _save(tmp_path, base="model") == ["model.safetensors", *kept[1:], "weights.safetensors"]


def test_an_error_leaves_the_older_checkpoint_alone(tmp_path: Path) -> None:
    before = _save(tmp_path, max_shard_size=100)
    with pytest.raises(KeyError), staged(tmp_path, replaces=".*") as stage:
        (stage / "new").write_text("x")
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == before
