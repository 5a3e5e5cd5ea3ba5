"""What vLLM and SGLang take, judged without them; test_servers.py asks their own code."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.checkpoint.servable import check_servable
from auto_gptq.errors import MissingFileError
from auto_gptq.modeling import BaseGPTQForCausalLM
from tests.tiny import tiny_examples, tiny_model

# Wide enough for the kernels: multiples of 128 everywhere.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
GOOD = {"bits": 4, "group_size": 128, "static_groups": True}
BOTH = ("vLLM", "SGLang")


def saved(folder: Path, **settings: Any) -> Path:
    config = BaseQuantizeConfig(**GOOD | {"model_file_base_name": "model"} | settings)
    wrapper = BaseGPTQForCausalLM(tiny_model(num_hidden_layers=2, **WIDE), False, config)
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(folder)
    return folder


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "recommended": ({}, {}),
    "8 bits": ({"bits": 8}, {}),
    "one group": ({"group_size": -1, "static_groups": False}, {}),
    "no order": ({"desc_act": False, "static_groups": False}, {}),
    "gptq_v2": ({"checkpoint_format": "gptq_v2"}, {}),
    "packed head": ({"lm_head": True}, {}),
    "3 bits": ({"bits": 3}, dict.fromkeys(BOTH, "bits=3 with sym=True")),
    "asymmetric": ({"sym": False}, dict.fromkeys(BOTH, "bits=4 with sym=False")),
    "groups of 16": ({"group_size": 16}, dict.fromkeys(BOTH, "group_size=16")),
    "act-order": ({"static_groups": False, "group_size": 32}, {"vLLM": "desc_act=True with"}),
    "whole blocks dense": ({"dynamic": {r"-:model\.layers\.0\.": {}}}, {}),
    "down_proj in 8 bits": ({"dynamic": {r".*down_proj": {"bits": 8}}}, {}),
    "one of three dense": (
        {"dynamic": {r"-:.*k_proj": {}}},
        dict.fromkeys(BOTH, "run as one and must be packed alike"),
    ),
    "one of two in 8 bits": (
        {"dynamic": {r".*up_proj": {"bits": 8}}},
        dict.fromkeys(BOTH, "run as one and must be packed alike"),
    ),
    "a pattern that misses the fused name": (
        {"dynamic": {r".*\.(gate|up)_proj": {"bits": 8}}},
        dict.fromkeys(BOTH, "does not match model.layers.0.mlp.gate_up_proj"),
    ),
}
# What their own code answered, by tests/integrations/test_servers.py, which asks it again.
RECORDED = json.loads((Path(__file__).parent / "servers.json").read_text())


@pytest.mark.parametrize(("settings", "refusals"), SETTINGS.values(), ids=SETTINGS)
def test_the_settings_decide(
    settings: dict[str, Any],
    refusals: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    caplog.set_level(logging.WARNING, "auto_gptq.modeling.save")
    verdicts = check_servable(saved(tmp_path, **settings))
    assert {server for server, verdict in verdicts.items() if not verdict} == set(refusals)
    theirs = RECORDED[request.node.callspec.id.replace(" ", "_")]
    for server, verdict in verdicts.items():
        named = {kernel.partition(" ")[0] for kernel in verdict.kernels}
        assert named == set(theirs[server].get("kernels", ()))
    for server, reason in refusals.items():
        assert reason in str(verdicts[server])
        assert not verdicts[server].kernels
    said = [record.message for record in caplog.records if "server" in record.message]
    assert len(said) == bool(refusals)  # one line, at save
    assert all(str(verdicts[server]) in said[0] for server in refusals)


def test_the_kernel_is_named(tmp_path: Path) -> None:
    verdicts = check_servable(saved(tmp_path))
    assert verdicts["vLLM"].kernels == ("Machete on Hopper, Marlin elsewhere",)
    assert str(verdicts["SGLang"]) == "SGLang runs it with Marlin"
    narrow = saved(tmp_path / "narrow", group_size=32)
    assert check_servable(narrow)["vLLM"].kernels == ("Marlin",)


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def _permute(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.g_idx"] = (
        torch.arange(256, dtype=torch.int32).flip(0) // 128
    )


def _shift_zeros(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.qzeros"][0, 0] = 0


def _forget_sym(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]["sym"]


def _forget_head(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    down = "model.layers.1.mlp.down_proj."
    for name in [name for name in tensors if name.startswith(down)]:
        tensors[name.replace(down, "lm_head.")] = tensors[name].clone()


def _forget_all(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]


def _marlin(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["checkpoint_format"] = "marlin"


FILES: dict[str, tuple[Change, str]] = {
    "order unsaid": (_permute, r"g_idx is not in order.*\(model\.layers\.1\.mlp\.down_proj\)"),
    "zeros": (_shift_zeros, "zero points are not the middle code"),
    "sym": (_forget_sym, "quantization_config lacks sym"),
    "head": (_forget_head, "lm_head is packed, but lm_head is not true"),
    "no settings": (_forget_all, "has no quantization_config with quant_method 'gptq'"),
    "Marlin": (_marlin, "in Marlin's own layout"),
}


@pytest.mark.parametrize(("change", "reason"), FILES.values(), ids=FILES)
def test_the_tensors_decide_as_well(change: Change, reason: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for verdict in check_servable(folder).values():
        assert len(verdict.refusals) == 1
        assert re.search(reason, str(verdict))


def test_sglang_wants_whole_tiles_and_vllm_pads(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, config)
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(tmp_path)
    verdicts = check_servable(tmp_path)
    assert verdicts["vLLM"]
    assert "96 inputs and 64 outputs; they must be multiples of 128 and 64" in str(
        verdicts["SGLang"]
    )


def test_sglang_has_to_be_told_what_is_dense(tmp_path: Path) -> None:
    folder = saved(tmp_path, **SETTINGS["whole blocks dense"][0])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["dynamic"]
    (folder / "config.json").write_text(json.dumps(config))
    verdicts = check_servable(folder)
    assert verdicts["vLLM"]
    assert "dense, but `dynamic` does not leave out model.layers.0." in str(verdicts["SGLang"])


def test_a_pickled_checkpoint_under_a_name_of_its_own_is_judged_too(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(**GOOD, model_file_base_name="mine")
    wrapper = BaseGPTQForCausalLM(tiny_model(**WIDE), False, config)
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(tmp_path, use_safetensors=False)
    assert all(check_servable(tmp_path, model_basename="mine").values())
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        check_servable(Path(__file__).parent)
