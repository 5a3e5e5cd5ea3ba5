"""Our safetensors files are read by the library itself, and are the same every time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from auto_gptq.checkpoint.safetensors_file import DTYPES, Outgoing, write_file


def _tensors() -> dict[str, torch.Tensor]:
    wide = torch.randn(6, 8)
    return {
        "half": wide.half(),
        "brain": wide.bfloat16(),
        "words": torch.randint(-100, 100, (3, 5), dtype=torch.int32),
        "view": wide.t()[1:3],
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "eighth": wide.to(torch.float8_e4m3fn),
        "naïve ☃": torch.arange(3),
    }


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    write_file(path, {name: Outgoing.of(tensor) for name, tensor in tensors.items()}, metadata)
    return path.read_bytes()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors, metadata = _tensors(), {"format": "pt", "b": "ü", "a": '"'}
    _write(tmp_path / "ours.safetensors", tensors, metadata)
    with safe_open(tmp_path / "ours.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
        assert set(opened.keys()) == set(tensors)
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(-1), tensors[name].reshape(-1)), name


def test_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    tensors, metadata = _tensors(), {str(i): "x" for i in range(20)}
    first = _write(tmp_path / "1", tensors, metadata)
    turned = dict(reversed(tensors.items()))
    assert _write(tmp_path / "2", turned, dict(reversed(metadata.items()))) == first


def test_the_header_is_aligned_and_so_are_the_tensors(tmp_path: Path) -> None:
    content = _write(tmp_path / "x", _tensors(), {})
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end
        assert end % DTYPES[entry["dtype"]].itemsize == 0
        end = entry["data_offsets"][1]
    assert len(content) == 8 + length + end


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_has_the_librarys_name(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=DTYPES[name])}, tmp_path / "theirs")
    with safe_open(tmp_path / "theirs", "pt") as opened:
        assert opened.get_slice("x").get_dtype() == name
    _write(tmp_path / "ours", {"x": torch.ones(2, dtype=DTYPES[name])}, {})
    assert load_file(tmp_path / "ours")["x"].dtype == DTYPES[name]


def test_tensors_are_made_one_after_another(tmp_path: Path) -> None:
    """Each is dropped before the next is made, so a file needs the memory of one tensor."""
    made: list[weakref.ref[Any]] = []

    def make() -> torch.Tensor:
        assert not any(array() is not None for array in made)
        array = np.zeros(4, dtype=np.float32)  # lives as long as the tensor's memory
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    write_file(tmp_path / "x", {str(i): Outgoing(torch.float32, (4,), make) for i in range(3)}, {})
    assert len(made) == 3


def test_a_tensor_that_is_not_what_was_announced_stops_the_writing(tmp_path: Path) -> None:
    wrong = Outgoing(torch.float32, (4,), lambda: torch.zeros(5))
    with pytest.raises(AssertionError, match="announced"):
        write_file(tmp_path / "x", {"x": wrong}, {})
