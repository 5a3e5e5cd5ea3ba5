"""A run that was ended at any moment goes on, and ends with the same bytes."""

from __future__ import annotations

import copy
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq import BaseQuantizeConfig
from auto_gptq.errors import ConfigError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.pipeline import quantize as pipeline
from tests.tiny import tiny_examples, tiny_model

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 4
WEIGHTS = "gptq_model-4bit-32g.safetensors"
# What a user's script does; it is started again until it comes to its end.
SCRIPT = f"""
import sys, torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import BaseGPTQForCausalLM
from tests.tiny import tiny_examples, tiny_model
torch.manual_seed(0)
model = tiny_model(num_hidden_layers={BLOCKS})
examples = tiny_examples(16, 128)
wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
wrapper.quantize(examples, work_dir=sys.argv[1])
wrapper.save_quantized(sys.argv[2])
"""


def _start(work_dir: Path, target: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, work_dir, target], cwd=ROOT)


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert _start(tmp_path / "calm", tmp_path / "expected").wait() == 0
    work, target = tmp_path / "work", tmp_path / "found"
    for wanted in (1, 2, 3):
        process = _start(work, target)
        while process.poll() is None and len(list(work.glob("block-*"))) < wanted:
            time.sleep(0.001)
        time.sleep(random.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (target / WEIGHTS).exists(), "killed too late to show anything"
    assert _start(work, target).wait() == 0
    assert (target / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
    assert not list(work.glob(".partial-*"))


def _wrapper(model: Any, **settings: Any) -> BaseGPTQForCausalLM:
    config = BaseQuantizeConfig(**{"group_size": 32} | settings)
    return BaseGPTQForCausalLM(copy.deepcopy(model), False, config)


@pytest.mark.parametrize(
    "settings", [{}, {"correction": 0.5, "tuning_epochs": 1}], ids=["plain", "beside the original"]
)
def test_finished_blocks_are_not_solved_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = tiny_model(), tiny_examples()
    first = _wrapper(model, **settings)
    first.quantize(examples, work_dir=tmp_path)
    (tmp_path / "block-00001.safetensors").write_bytes(b"damaged")
    solved_blocks: list[int] = []
    solve = pipeline._Run._solve

    def counted(self: Any, index: int, *rest: Any) -> Any:
        solved_blocks.append(index)
        return solve(self, index, *rest)

    monkeypatch.setattr(pipeline._Run, "_solve", counted)
    again = _wrapper(model, **settings)
    again.quantize(examples, work_dir=tmp_path)
    assert solved_blocks == [1]  # the damaged one
    assert [(e.name, e.error) for e in again.report] == [(e.name, e.error) for e in first.report]
    tensors = first.model.state_dict()
    assert all(torch.equal(tensors[name], t) for name, t in again.model.state_dict().items())


def test_a_run_of_something_else_is_refused(tmp_path: Path) -> None:
    model, examples = tiny_model(), tiny_examples()
    _wrapper(model).quantize(examples, work_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"bits \(was 4, is 3\)"):
        _wrapper(model, bits=3).quantize(examples, work_dir=tmp_path)
    with pytest.raises(ConfigError, match="differs in examples"):
        _wrapper(model).quantize(examples[:-1], work_dir=tmp_path)
    with pytest.raises(ConfigError, match="differs in weights"):
        _wrapper(tiny_model()).quantize(examples, work_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    _wrapper(model, model_file_base_name="model").quantize(examples, work_dir=tmp_path)
