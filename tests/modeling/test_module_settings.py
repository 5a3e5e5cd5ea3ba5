"""Settings per module (`dynamic`) and a quantized output head, from quantizing to loading."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.errors import ConfigError, ModuleShapeError, UnsupportedModelError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize
from tests.tiny import assert_same_logits, tiny_examples, tiny_model

DYNAMIC: dict[str, dict[str, Any]] = {
    r"-:model\.layers\.0\.mlp\.down_proj": {},
    r"+:.*\.q_proj": {"bits": 8, "group_size": 64},
    r"model\.layers\.1\..*o_proj": {"bits": 2, "sym": False, "desc_act": False},
}


def _quantized(model: Any = None, **settings: Any) -> BaseGPTQForCausalLM:
    config = BaseQuantizeConfig(**{"bits": 4, "group_size": 32} | settings)
    wrapper = BaseGPTQForCausalLM(model or tiny_model(), False, config)
    torch.manual_seed(1)
    wrapper.quantize(tiny_examples(), batch_size=2)
    return wrapper


def _reloaded_beside_its_twin(folder: Path) -> BaseGPTQForCausalLM:
    """Load a checkpoint, and compare it with what its own dequantized weights compute."""
    loaded = AutoGPTQForCausalLM.from_quantized(folder, device="cpu")
    twin = copy.deepcopy(loaded.model)
    dequantize(twin, torch.float32)
    ids = tiny_examples(1)[0]["input_ids"][None]
    found, wanted = loaded(input_ids=ids).logits, twin(input_ids=ids).logits
    assert_same_logits(found, wanted)
    return loaded


def test_patterns_override_and_skip_and_come_back_from_disk(tmp_path: Path) -> None:
    wrapper = _quantized(dynamic=DYNAMIC)
    wrapper.save_quantized(tmp_path)
    loaded = _reloaded_beside_its_twin(tmp_path)
    modules = dict(loaded.model.named_modules())
    assert type(modules["model.layers.0.mlp.down_proj"]) is torch.nn.Linear
    made = dict(wrapper.model.named_modules())
    for i in (0, 1):
        block = f"model.layers.{i}"
        found = {n: modules[f"{block}.self_attn.{n}_proj"] for n in ("q", "k", "v", "o")}
        assert (found["q"].bits, found["q"].group_size) == (8, 64)
        assert {(found[n].bits, found[n].group_size) for n in ("k", "v")} == {(4, 32)}
        assert found["o"].bits == (4 if i == 0 else 2)
    for name, layer in modules.items():
        if isinstance(layer, QuantLinear):
            assert torch.equal(layer.weight, made[name].weight), name
    for name in ("quantize_config.json", "config.json"):
        content = json.loads((tmp_path / name).read_text())
        assert content.get("quantization_config", content)["dynamic"] == DYNAMIC


def test_modules_of_one_input_but_other_settings_are_solved_as_if_alone() -> None:
    model = tiny_model()
    apart = _quantized(copy.deepcopy(model), dynamic={r".*\.k_proj": {"bits": 8}})
    alone = _quantized(copy.deepcopy(model), bits=8)
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(
        apart.model.get_submodule(name).weight, alone.model.get_submodule(name).weight
    )
    q = [entry for entry in apart.report if entry.name.endswith("layers.0.self_attn.q_proj")]
    k = [entry for entry in apart.report if entry.name == name]
    assert q[0].error > 20 * k[0].error  # four bits more: 16 times finer steps, 256 times the error


def test_the_first_pattern_that_matches_from_the_start_decides() -> None:
    config = BaseQuantizeConfig(dynamic={r"-:.*\.0\.": {}, r".*\.0\.q": {"bits": 8}, "q": {}})
    assert config.settings_for("layers.0.q") is None
    assert config.settings_for("layers.1.q") is config
    assert config.settings_for("q").bits == 4  # type: ignore[union-attr]


BAD: dict[str, tuple[Any, str]] = {
    "not a dict": (["a"], "dynamic is a list"),
    "no settings": ({"a": None}, r"dynamic\['a'\] is None"),
    "bad expression": ({"+:a(": {"bits": 8}}, r"dynamic\['\+:a\('\] is not a regular expression"),
    "unknown setting": ({"a": {"bit": 8}}, r"dynamic\['a'\] sets bit; .* bits, group_size"),
    "bits": ({"ok": {"bits": 8}, "b": {"bits": 5}}, r"dynamic\['b'\]: bits is 5"),
    "group size": ({"b": {"group_size": 0}}, r"dynamic\['b'\]: group_size is 0"),
    "text for a number": ({"b": {"group_size": "x"}}, r"dynamic\['b'\]: "),
    "settings of what is skipped": ({"-:b": {"bits": 8}}, r"leaves modules dense"),
}


@pytest.mark.parametrize(("dynamic", "message"), BAD.values(), ids=BAD)
def test_patterns_that_cannot_work_are_named(dynamic: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BaseQuantizeConfig(dynamic=dynamic)


def test_other_tools_notes_about_modules_are_dropped() -> None:
    given = {"bits": 4, "sym": True, "dynamic": {"a": {"bits": 8, "mse": 2.4}, "-:b": {"bits": 4}}}
    assert BaseQuantizeConfig.from_quant_config(given).dynamic == {"a": {"bits": 8}, "-:b": {}}


def test_a_pattern_that_rules_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _quantized(dynamic={"q_proj": {"bits": 8}, r".*q_proj": {"bits": 8}})
    assert "['q_proj'] of `dynamic`" in caplog.text


def test_a_group_too_large_for_one_module_is_refused_before_anything_is_changed() -> None:
    with pytest.raises(ModuleShapeError, match=r"o_proj maps 64 inputs .* group_size=128"):
        _quantized(dynamic={".*o_proj": {"group_size": 128}})
    with pytest.raises(UnsupportedModelError, match="does not skip"):
        _quantized(dynamic={"-:.*": {}})


def test_act_order_with_static_groups_is_saved_as_none_per_module_too(tmp_path: Path) -> None:
    dynamic: dict[str, Any] = {".*o_proj": {"desc_act": True}, ".*q_proj": {"static_groups": False}}
    wrapper = _quantized(desc_act=True, static_groups=True, dynamic=dynamic)
    wrapper.save_quantized(tmp_path)
    saved = json.loads((tmp_path / "quantize_config.json").read_text())
    assert saved["desc_act"] is False
    assert saved["dynamic"][".*o_proj"] == {"desc_act": False}
    assert saved["dynamic"][".*q_proj"] == {"static_groups": False, "desc_act": True}
    assert dynamic[".*o_proj"] == {"desc_act": True}  # the user's own is left alone
    _reloaded_beside_its_twin(tmp_path)


HEADS = ["llama", "gemma", "opt", "gpt2", "gpt_neox", "phi", "falcon"]


@torch.no_grad()
@pytest.mark.parametrize("model_type", HEADS)
@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_the_output_head_is_quantized_on_what_enters_it(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied)
    dense_embedding = model.get_input_embeddings().weight.detach().clone()
    wrapper = _quantized(model, lm_head=True)
    head = "lm_head"
    stored = "embed_out" if model_type == "gpt_neox" else head  # transformers 5 renamed it
    entry = wrapper.report[-1]
    assert (entry.name, entry.block, entry.tokens) == (head, 2, 6 * 32)
    assert 0 < entry.error < 0.05
    wrapper.save_quantized(tmp_path)
    settings = json.loads((tmp_path / "quantize_config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    assert settings["lm_head"] is True
    assert config["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert f"{stored}.qweight" in tensors
    assert f"{stored}.weight" not in tensors
    loaded = _reloaded_beside_its_twin(tmp_path)
    assert isinstance(loaded.model.get_submodule(head), QuantLinear)
    assert torch.equal(loaded.model.get_input_embeddings().weight.half(), dense_embedding.half())
    ids = torch.tensor([[5, 6, 7]])
    wrapper.model.float()
    found = loaded(input_ids=ids).logits
    assert_same_logits(found, wrapper(input_ids=ids).logits)


def test_a_head_said_to_be_tied_by_the_config_is_untied_when_packed(tmp_path: Path) -> None:
    """Other tools leave tie_word_embeddings at true beside a packed lm_head."""
    _quantized(tiny_model(tie_word_embeddings=True), lm_head=True).save_quantized(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = _reloaded_beside_its_twin(tmp_path)
    assert loaded.config.tie_word_embeddings is False


def test_a_head_can_have_settings_of_its_own(tmp_path: Path) -> None:
    wrapper = _quantized(lm_head=True, dynamic={"lm_head": {"bits": 8}})
    wrapper.save_quantized(tmp_path)
    loaded = _reloaded_beside_its_twin(tmp_path)
    assert loaded.model.lm_head.bits == 8
    skipping = _quantized(lm_head=True, dynamic={"-:lm_head": {}})
    assert type(skipping.model.lm_head) is torch.nn.Linear


def test_padding_does_not_enter_the_hessian_of_the_head() -> None:
    model = tiny_model()
    examples = tiny_examples(4, 24)
    examples[0] = {key: row[:8] for key, row in examples[0].items()}
    config = BaseQuantizeConfig(group_size=32, lm_head=True)
    wrapper = BaseGPTQForCausalLM(model, False, config)
    wrapper.quantize(examples, batch_size=4)
    assert wrapper.report[-1].tokens == 8 + 3 * 24


def test_a_head_that_cannot_be_packed_is_refused_before_anything_is_changed() -> None:
    model = tiny_model(vocab_size=250)
    with pytest.raises(ModuleShapeError, match="lm_head maps 64 inputs to 250 outputs"):
        wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32, lm_head=True))
        wrapper.quantize([{"input_ids": [1, 2], "attention_mask": [1, 1]}])
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
