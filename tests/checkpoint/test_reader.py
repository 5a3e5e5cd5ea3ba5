"""Damaged weight files: an error of ours that names the file, whatever bytes are wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq.checkpoint.reader import WeightFiles, read_headers, read_tensors
from auto_gptq.checkpoint.safetensors_file import Outgoing, write_file
from auto_gptq.errors import CheckpointError

TENSORS = {"a.qweight": torch.ones(8, 4, dtype=torch.int32), "b": torch.arange(5.0)}


def _write(path: Path, kind: str) -> None:
    if kind == "safetensors":
        write_file(path, {name: Outgoing.of(tensor) for name, tensor in TENSORS.items()}, {})
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old pickle"])
def test_headers_and_tensors_are_those_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.bin")
    _write(path, kind)
    weights = WeightFiles([path], "x")
    headers = read_headers(weights)
    assert {n: (h.shape, h.dtype, h.file) for n, h in headers.items()} == {
        n: (list(t.shape), t.dtype, path) for n, t in TENSORS.items()
    }
    found = dict(read_tensors(weights, TENSORS))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch.load
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old pickle"])
def test_random_damage_gives_no_other_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.bin")
    _write(path, kind)
    good, refused = path.read_bytes(), 0
    for _ in range(300):
        content = bytearray(good)
        if random.random() < 0.3:
            del content[random.randrange(len(content)) :]
        for _ in range(random.randrange(1, 4)):
            if content:
                content[random.randrange(min(len(content), 900))] = random.randrange(256)
        path.write_bytes(content)
        try:
            read_headers(WeightFiles([path], "x"))
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("code from a pickle ran",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
def test_code_in_a_pickle_does_not_run(
    zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": _Code()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read safely"):
        read_headers(WeightFiles([path], "x"))
    assert "code" not in capsys.readouterr().out
