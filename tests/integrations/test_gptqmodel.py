"""GPTQModel and this package read each other's checkpoints.

It runs where GPTQModel is: ``pip install --no-deps --target DIR gptqmodel==7.6.0``, the last that
takes torch 2.13, with what it needs (defuser device-smi dill logbar pypcre threadpoolctl tokenicer
torchao), and DIR on PYTHONPATH.  benchmarks/results/gptqmodel.json keeps what was found there.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_gptq import AutoGPTQForCausalLM
from auto_gptq.integrations import transformers as ours
from tests.integrations.checkpoints import IDS, make
from tests.tiny import tiny_examples, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed"
    ),
    pytest.mark.filterwarnings("ignore"),  # it and its libraries have many
]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
# Both compute in float16, whose 11 bits are rounded a few times on the way through two blocks.
TOLERANCE = 2**-9

OURS: dict[str, dict[str, Any]] = {
    "act-order": {},
    "static groups": {"static_groups": True},
    "8 bits": {"bits": 8},
    "gptq_v2, asymmetric": {"checkpoint_format": "gptq_v2", "sym": False},
    "short last group": {"group_size": 256, "static_groups": True},  # of 384 inputs, and of 256
}
THEIRS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "act-order": {"desc_act": True, "act_group_aware": False},
    "8 bits": {"bits": 8},
    "gptq_v2": {"format": "gptq_v2"},
}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give the package; with fewer than three cores it fails to share them among its threads."""
    monkeypatch.chdir(tmp_path)  # it leaves its log where it runs
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    import gptqmodel

    return gptqmodel


@pytest.fixture
def note() -> Callable[[str, float], None]:
    """Keep a difference in benchmarks/results/gptqmodel.json."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "gptqmodel.json"

    def add(name: str, difference: float) -> None:
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(found | {name: difference}, indent=1, sort_keys=True) + "\n")

    return add


def _their_logits(peer: Any, folder: Path) -> torch.Tensor:
    model = peer.GPTQModel.load(
        str(folder), backend=peer.BACKEND.TORCH, device="cpu", dtype=torch.float16
    )
    logits: torch.Tensor = model.model(IDS).logits
    return logits


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_gptqmodel_computes_the_same_from_our_checkpoints(
    settings: dict[str, Any], peer: Any, tmp_path: Path, note: Any, request: pytest.FixtureRequest
) -> None:
    wide = WIDE | (
        {"hidden_size": 256, "intermediate_size": 384} if "group_size" in settings else {}
    )
    folder = make(tmp_path / "ours", "llama", {"group_size": 64} | settings, **wide)
    tiny_tokenizer().save_pretrained(folder)
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", torch_dtype=torch.float16)
    difference = _difference(_their_logits(peer, folder), model(input_ids=IDS).logits)
    note(f"ours in theirs: {request.node.callspec.id}", difference)
    assert difference <= TOLERANCE


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_we_compute_the_same_from_what_gptqmodel_writes(
    settings: dict[str, Any], peer: Any, tmp_path: Path, note: Any, request: pytest.FixtureRequest
) -> None:
    tiny_model("llama", **WIDE).save_pretrained(tmp_path / "full")
    tiny_tokenizer().save_pretrained(tmp_path / "full")
    config = peer.QuantizeConfig(**{"bits": 4, "group_size": 64} | settings)
    model = peer.GPTQModel.load(str(tmp_path / "full"), config, device="cpu")
    model.quantize(tiny_examples(8, 48), backend=peer.BACKEND.TORCH)
    folder = tmp_path / "theirs"
    model.save(str(folder))
    wanted = _their_logits(peer, folder)
    wrapper = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", torch_dtype=torch.float16)
    ours.enable()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    for logits in (wrapper(input_ids=IDS).logits, plain(IDS).logits):
        difference = _difference(logits, wanted)
        note(f"theirs in ours: {request.node.callspec.id}", difference)
        assert difference <= TOLERANCE
