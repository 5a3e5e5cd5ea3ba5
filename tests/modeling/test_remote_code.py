"""Models that bring their own code: quantized by discovery, saved with it, loaded by both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.cli import main
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize
from tests.tiny import assert_same_logits, tiny_examples

CODE = Path(__file__).parents[1] / "remote"
# Folder → class of the model, linears packed, and the steps of a block.
STYLES: dict[str, tuple[str, int, list[str]]] = {
    "qwen1": ("Qwen1LMHeadModel", 10, ["attn.c_attn", "attn.c_proj", "mlp.w1 mlp.w2"]),
    "glm": (
        "GLMForConditionalGeneration",
        8,
        ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h"],
    ),
    "internlm2": (
        "InternLM2ForCausalLM",
        10,
        ["attention.wqkv", "attention.wo", "feed_forward.w1 feed_forward.w3", "feed_forward.w2"],
    ),
    "baichuan": (
        "BaichuanForCausalLM",
        10,
        ["self_attn.W_pack", "self_attn.o_proj", "mlp.up_proj mlp.gate_proj"],
    ),
    "phi3": (
        "Phi3ForCausalLM",
        14,
        ["self_attn.qkv_proj", "mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj"],
    ),
}


def publish(style: str, folder: Path) -> Path:
    """Write a model as its authors would: code, a configuration that points to it, weights."""
    folder.mkdir()
    for file in (CODE / style).glob("*.py"):
        shutil.copy(file, folder)
    kind = STYLES[style][0]
    (configuration,) = folder.glob("configuration_*.py")
    class_name = next(
        line.split()[1].partition("(")[0]
        for line in configuration.read_text().splitlines()
        if line.startswith("class ")
    )
    auto_map = {
        "AutoConfig": f"configuration_{style}.{class_name}",
        "AutoModelForCausalLM": f"modeling_{style}.{kind}",
    }
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map, "architectures": [kind]}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    if getattr(config, "tie_word_embeddings", False):
        model.lm_head.weight = model.model.embed_tokens.weight
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written |= {"model_type": config.model_type, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy code into a folder of the tests, where it imports it from."""
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)
        yield


def quantized(folder: Path) -> Any:
    wrapper = AutoGPTQForCausalLM.from_pretrained(
        folder,
        BaseQuantizeConfig(bits=4, group_size=32, desc_act=False),
        trust_remote_code=True,
        torch_dtype=torch.float32,
    )
    rows = tiny_examples(3, 24)
    rows[0]["input_ids"] = rows[0]["input_ids"][:17]  # so that a row of the first batch is padded
    rows[0]["attention_mask"] = rows[0]["attention_mask"][:17]
    wrapper.quantize(rows, batch_size=2)
    return wrapper


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_a_model_with_code_of_its_own_comes_back_with_it(
    style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder it came from is gone by then: nothing may point there."""
    _, packed, steps = STYLES[style]
    source, first, second = publish(style, tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    assert main(["inspect", str(source), "--trust-remote-code", "--group-size", "32"]) == 0
    shown = capsys.readouterr().out
    for step in steps:
        assert f"\n  {step}   [" in shown
    assert ("the row, for" in shown) == ("a row of the table" not in shown)
    wrapper = quantized(source)
    assert sum(isinstance(m, QuantLinear) for m in wrapper.model.modules()) == packed
    assert {entry.tokens for entry in wrapper.report if "experts" not in entry.name} == {17 + 48}
    wrapper.save_quantized(first)
    code = {file.name: file.read_bytes() for file in source.glob("*.py")}
    shutil.rmtree(source)
    again = AutoGPTQForCausalLM.from_quantized(first, device="cpu", trust_remote_code=True)
    again.save_quantized(second)
    shutil.rmtree(first)
    assert {file.name: file.read_bytes() for file in second.glob("*.py")} == code
    ids = torch.arange(3, 3 + 24)[None]
    dequantize(wrapper.model, torch.float32)
    wanted = wrapper.model(input_ids=ids).logits
    by_us = AutoGPTQForCausalLM.from_quantized(second, device="cpu", trust_remote_code=True)
    assert_same_logits(by_us(input_ids=ids).logits, wanted)
    by_transformers = AutoModelForCausalLM.from_pretrained(
        second, trust_remote_code=True, dtype=torch.float32
    )
    assert sum(isinstance(m, QuantLinear) for m in by_transformers.modules()) == packed
    assert_same_logits(by_transformers(input_ids=ids).logits, wanted)
