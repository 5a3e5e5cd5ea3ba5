"""Hostile and damaged checkpoints: each gives an error that names the tensor or the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.errors import CheckpointError
from auto_gptq.modeling import BaseGPTQForCausalLM
from tests.tiny import tiny_examples, tiny_model

BASE = "gptq_model-4bit-128g"
WEIGHTS = f"{BASE}.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False)
    wrapper = BaseGPTQForCausalLM(tiny_model(num_hidden_layers=1, **WIDE), False, config)
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(folder / "gptq")
    wrapper.save_quantized(folder / "marlin", checkpoint_format="marlin")
    wrapper.save_quantized(folder / "bin", use_safetensors=False)
    wrapper.save_quantized(folder / "shards", max_shard_size="100KB")
    return folder


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Break a checkpoint by changing its tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def _tensor(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    name = f"{LAYER}.{leaf}"
    return _tensors(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[3] = value
    return tensor


def _bias(value: float) -> Callable[[Path], None]:
    bias = _with(torch.zeros(256), value)
    return _tensors(lambda tensors: tensors.update({f"{LAYER}.bias": bias}))


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Break a checkpoint by changing the header of the file."""

    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return edit


def _overlap(header: dict[str, Any]) -> None:
    header[f"{LAYER}.qweight"]["data_offsets"] = header[f"{LAYER}.qzeros"]["data_offsets"]


def _beyond(header: dict[str, Any]) -> None:
    header[f"{LAYER}.qweight"]["data_offsets"][1] += 1 << 40


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def _index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"{WEIGHTS}.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def _link_outside(folder: Path) -> None:
    shard = next(folder.glob("*-00001-of-*"))
    shard.rename(folder.parent / "secret.safetensors")
    _index(lambda names: names.update(dict.fromkeys(names, "x/../../secret.safetensors")))(folder)


def _duplicate(folder: Path) -> None:
    """The same tensor in two shards."""
    first, second = sorted(folder.glob("*-of-*"))[:2]
    stolen = load_file(first)
    name = next(iter(stolen))
    save_file(load_file(second) | {name: stolen[name]}, second)


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("code from a pickle ran",))


def _bin(content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / f"{BASE}.bin")


HUGE = b"\xff" * 7 + b"\x7f"  # a header of 2**63 - 1 bytes
CANNOT = rf"{BASE}\.\w+ cannot be read"
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "shape": ("gptq", _tensor("qweight", lambda t: t[:-1]), r"q_proj\.qweight has shape \[31, 256"),
    "flat": ("gptq", _tensor("scales", torch.ravel), r"q_proj\.scales has shape \[512\]"),
    "Marlin shape": ("marlin", _tensor("B", lambda t: t.t()), r"q_proj\.B has shape \[512, 16\]"),
    "Marlin scales": ("marlin", _tensor("s", lambda t: t[:1]), r"q_proj\.s has shape \[1, 256\]"),
    "float codes": (
        "gptq",
        _tensor("qweight", Tensor.float),
        r"qweight has dtype torch.float32.*32",
    ),
    "wide codes": (
        "gptq",
        _tensor("qweight", Tensor.long),
        r"q_proj\.qweight has dtype torch.int64",
    ),
    "float zeros": (
        "gptq",
        _tensor("qzeros", Tensor.half),
        r"q_proj\.qzeros has dtype torch.float16",
    ),
    "integer scales": (
        "gptq",
        _tensor("scales", Tensor.int),
        r"q_proj\.scales has dtype torch.int32",
    ),
    "float groups": (
        "gptq",
        _tensor("g_idx", Tensor.float),
        r"q_proj\.g_idx has dtype torch.float32",
    ),
    "Marlin float codes": (
        "marlin",
        _tensor("B", Tensor.float),
        r"q_proj\.B has dtype torch.float32",
    ),
    "group out of range": (
        "gptq",
        _tensor("g_idx", lambda t: _with(t, 2)),
        "g_idx names groups 0 to 2",
    ),
    "negative group": (
        "gptq",
        _tensor("g_idx", lambda t: _with(t, -7)),
        "g_idx names groups -7 to 1",
    ),
    "group that wraps to 0": (
        "gptq",
        _tensor("g_idx", lambda t: _with(t.long(), 1 << 32)),
        r"q_proj\.g_idx names groups 0 to 2147483647",
    ),
    "NaN scale": (
        "gptq",
        _tensor("scales", lambda t: _with(t, torch.nan)),
        r"q_proj\.scales holds NaN",
    ),
    "infinite Marlin scale": (
        "marlin",
        _tensor("s", lambda t: _with(t, torch.inf)),
        r"q_proj\.scales holds NaN or infinity",
    ),
    "bias of another model": ("gptq", _bias(1.0), r"q_proj\.bias holds 1 values other than 0"),
    "dense only": (
        "gptq",
        _tensors(lambda tensors: [tensors.pop(n) for n in list(tensors) if "proj" in n]),
        "holds no packed weights",
    ),
    "packed norm": (
        "gptq",
        _tensors(lambda ts: ts.update({"model.norm.qweight": torch.zeros(1, dtype=torch.int32)})),
        r"packed weights for model\.norm, which are no linear",
    ),
    "no scales": (
        "marlin",
        _tensors(lambda ts: ts.pop(f"{LAYER}.s")),
        rf"lacks 1 .*{LAYER}\.weight",
    ),
    "no zeros": (
        "gptq",
        _tensors(lambda ts: ts.pop(f"{LAYER}.qzeros")),
        rf"lacks 1 .*{LAYER}\.qzeros",
    ),
    "empty file": ("gptq", _file(WEIGHTS, b""), CANNOT),
    "truncated": ("gptq", _cut, CANNOT),
    "not safetensors": ("gptq", _file(WEIGHTS, b"GGUF" * 100), CANNOT),
    "endless header": ("gptq", _file(WEIGHTS, HUGE + b"{}"), CANNOT),
    "header is no JSON": ("gptq", _file(WEIGHTS, (4).to_bytes(8, "little") + b"{{{{"), CANNOT),
    "overlapping tensors": ("gptq", _header(_overlap), CANNOT),
    "tensor beyond the end": ("gptq", _header(_beyond), CANNOT),
    "empty .bin": ("bin", _file(f"{BASE}.bin", b""), CANNOT),
    "pickle with code": ("bin", _bin({"x": _Code()}), rf"{CANNOT} safely"),
    "whole module": ("bin", _bin(torch.nn.Linear(2, 2)), rf"{CANNOT} safely"),
    "list": ("bin", _bin([torch.zeros(2)]), rf"{BASE}\.bin holds a list, not named tensors"),
    "numbered tensors": ("bin", _bin({1: torch.zeros(2)}), rf"{BASE}\.bin holds a dict, not named"),
    "index leads outside": ("shards", _link_outside, "outside of the checkpoint"),
    "index of numbers": ("shards", _index(lambda names: names.update(x=3)), "is not an index"),
    "missing shard": (
        "shards",
        _index(lambda names: names.update(x="y.bin")),
        r"y\.bin, which is missing",
    ),
    "tensor in two shards": ("shards", _duplicate, r"\S+ lies in two files, .*00001-of.*00002-of"),
    "index is no JSON": (
        "shards",
        _file(f"{WEIGHTS}.index.json", b"{"),
        "is not an index of weights",
    ),
    "index is no text": (
        "shards",
        _file(f"{WEIGHTS}.index.json", b"\xff\xfe\x00"),
        "is not an index",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "message"), CASES.values(), ids=CASES)
def test_the_error_names_tensor_or_file(
    kind: str,
    damage: Callable[[Path], None],
    message: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(good / kind, tmp_path / "inner" / "checkpoint")
    load = AutoGPTQForCausalLM.from_quantized
    arguments: dict[str, Any] = {"device": "cpu", "use_safetensors": kind != "bin"}
    assert load(folder, **arguments).quantized
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder, **arguments)
    assert "code from a pickle" not in capsys.readouterr().out
