"""A model that stays on disk gives the same bytes, in little memory, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.calibration.activations import Activations
from auto_gptq.errors import CheckpointError, ConfigError, MissingFileError, QuantizedStateError
from tests.tiny import tiny_examples, tiny_model

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "gptq_model-4bit-32g.safetensors"


def _saved(folder: Path, model_type: str = "llama", **settings: Any) -> str:
    tiny_model(model_type, **settings).save_pretrained(folder, max_shard_size="100KB")
    return str(folder)


def _open(source: str, **settings: Any) -> Any:
    config = BaseQuantizeConfig(**{"group_size": 32} | settings)
    return AutoGPTQForCausalLM.from_pretrained(source, config, device_map="disk")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"lm_head": True}),
        ("llama", {"checkpoint_format": "gptq_v2", "sym": False}),
        ("gpt2", {}),
        ("gemma2", {"lm_head": True}),
    ],
    ids=["head", "v2", "tied Conv1D", "tied head"],
)
def test_the_files_are_those_of_a_model_in_memory(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source, examples = _saved(tmp_path / "dense", model_type), tiny_examples(8, 64)
    config = BaseQuantizeConfig(group_size=32, **settings)
    usual = AutoGPTQForCausalLM.from_pretrained(source, config)
    usual.quantize(examples)
    usual.save_quantized(tmp_path / "usual")
    streamed = _open(source, **settings)
    assert all(p.is_meta for p in streamed.model.parameters())
    streamed.quantize(examples, work_dir=tmp_path / "work")
    assert all(t.is_meta for n, t in streamed.model.state_dict().items() if "proj" in n)
    streamed.save_quantized(tmp_path / "streamed")
    for name in (WEIGHTS, "config.json", "quantize_config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (
            tmp_path / "usual" / name
        ).read_bytes()


def test_another_format_is_written_from_disk(tmp_path: Path) -> None:
    streamed = _open(_saved(tmp_path / "dense"))
    streamed.quantize(tiny_examples(8, 64), work_dir=tmp_path / "work")
    streamed.save_quantized(tmp_path / "v1")
    streamed.save_quantized(tmp_path / "v2", checkpoint_format="gptq_v2", max_shard_size="20KB")
    assert len(list((tmp_path / "v2").glob("*.safetensors"))) > 2
    ids = torch.arange(8)[None]
    one, two = (
        AutoGPTQForCausalLM.from_quantized(tmp_path / name, device="cpu")(ids).logits
        for name in ("v1", "v2")
    )
    assert torch.equal(one, two)


def test_it_says_what_it_needs(tmp_path: Path) -> None:
    source = _saved(tmp_path / "dense")
    streamed = _open(source)
    with pytest.raises(ConfigError, match="work_dir"):
        streamed.quantize(tiny_examples())
    with pytest.raises(QuantizedStateError, match="on disk"):
        streamed(torch.arange(8)[None])
    last = sorted((tmp_path / "dense").glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=f"{last.name} ends in the midst"):
        streamed.quantize(tiny_examples(), work_dir=tmp_path / "work")
    last.unlink()
    with pytest.raises(MissingFileError, match=f"{last.name} is gone"):
        streamed.quantize(tiny_examples(), work_dir=tmp_path / "work2")
    with pytest.raises(MissingFileError, match=f"names the file {last.name}, which is missing"):
        _open(source)
    last.write_bytes(whole)
    fresh = _open(source)
    fresh.quantize(tiny_examples(), work_dir=tmp_path / "work3")
    assert fresh.quantized


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    source = _saved(tmp_path / "dense")
    _saved(tmp_path / "other", hidden_size=32)
    (tmp_path / "other" / "config.json").replace(tmp_path / "dense" / "config.json")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[256, 64\]"):
        _open(source)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_hidden_states_come_back_as_they_went(home: str, device: Any, tmp_path: Path) -> None:
    tensors = [torch.randn(2, 3, 8), torch.randn(1, 3, 8)]
    kept = Activations(device, torch.bfloat16, 9, home=home, folder=tmp_path)
    for tensor in tensors:
        kept.append(tensor.to(device))
    kept[1] = -tensors[1].to(device)
    assert len(list(tmp_path.glob("*/*"))) == (2 if home == "disk" else 0)
    found = list(kept)
    assert [t.device.type for t in found] == [device.type] * 2
    assert torch.equal(found[0].cpu(), tensors[0].bfloat16())
    assert torch.equal(found[1].cpu(), -tensors[1].bfloat16())
    kept.close()
    assert not list(tmp_path.iterdir())


def test_a_run_gives_the_same_wherever_hidden_states_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, examples = _saved(tmp_path / "dense"), tiny_examples(8, 64)
    found = []
    for home in ("device", "host", "disk"):
        monkeypatch.setattr(Activations, "_choose", lambda *_args, home=home: home)
        model = _open(source, true_sequential=False)
        model.quantize(examples, work_dir=tmp_path / home)
        model.save_quantized(tmp_path / f"{home}-saved")
        found.append((tmp_path / f"{home}-saved" / WEIGHTS).read_bytes())
        assert not list((tmp_path / home).glob(".activations-*"))
    assert found[0] == found[1] == found[2]


# The model takes three times the memory that the process may ask for once all is imported.  The
# kernel counts that memory: anonymous and writable pages, the stacks of threads among them.
LIMITED = """
import re, resource, sys, torch
from pathlib import Path
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from tests.tiny import tiny_examples, tiny_model
torch.set_num_threads(1)
def used():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\\s+(\\d+)", status)[1]) * 1024
def quantize(source, target):
    config = BaseQuantizeConfig(group_size=64, scale_search=False)
    model = AutoGPTQForCausalLM.from_pretrained(
        source, config, torch_dtype=torch.float32, device_map="disk"
    )
    torch.manual_seed(0)
    model.quantize(tiny_examples(2, 64), work_dir=target + "-work")
    model.save_quantized(target)
# Once without a limit, so that all is imported and torch has its pools.
tiny_model().save_pretrained(sys.argv[2] + "-warm")
quantize(sys.argv[2] + "-warm", sys.argv[2] + "-warm-q")
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (used() + limit, resource.RLIM_INFINITY))
try:
    torch.empty(limit + 2**20, dtype=torch.uint8)
except RuntimeError:
    print("the limit holds")
quantize(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_model_of_three_times_the_memory_is_quantized(tmp_path: Path) -> None:
    big = tiny_model(
        dtype=torch.float32, hidden_size=256, intermediate_size=512, num_hidden_layers=40
    )
    size = sum(p.numel() * 4 for p in big.parameters())
    big.save_pretrained(tmp_path / "dense", max_shard_size="40MB")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "dense", tmp_path / "found", str(size // 3)],
        cwd=ROOT,
        # Tensors of a real model are mapped one by one; so shall these small ones, or the holes
        # that they leave in the heap would count.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "the limit holds" in run.stdout
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path / "found", device="cpu")
    assert torch.isfinite(loaded(torch.arange(16)[None]).logits).all()
