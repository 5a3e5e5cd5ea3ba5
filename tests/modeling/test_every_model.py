"""Models without a row: found out by running them, saved under the community's names, loaded."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.architectures import Architecture
from auto_gptq.errors import ConfigError, UnsupportedModelError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize
from auto_gptq.pipeline.discover import discover
from tests.tiny import MOST, tiny_examples, tiny_model
from tests.zoo import SENSES, round_trip, sighted, tiny_of

WEIGHTS = "gptq_model-4bit-32g.safetensors"
# One for each way in which models differ; scripts/supported_models.py tries all.
FAST = {
    "mixtral": 24,  # experts stored under other names than transformers 5 has
    "gpt_oss": 24,  # transposed, interleaved, with biases
    "llama4_text": 24,  # batched
    "jetmoe": 32,  # in the attention, too
    "deepseek_v3": 12,  # a dense block, then experts; an odd shape
    "dbrx": 24,  # experts of two dimensions
    "qwen3_next": 24,  # linear attention beside full
    "glm_moe_dsa": 0,  # a block hands more than hidden states to the next
    "gemma3": 0,  # sees; names of its own on disk
    "openai-gpt": 0,  # blocks that return a list
    "mamba": 0,  # no attention
}


@pytest.mark.parametrize(("model_type", "experts"), FAST.items(), ids=FAST)
def test_models_without_a_row_come_back_as_they_were_quantized(
    model_type: str, experts: int, tmp_path: Path
) -> None:
    trip = round_trip(model_type, tmp_path)
    assert trip.experts == experts
    assert trip.quantized > experts or model_type == "jetmoe"
    assert not any(".experts." in name and ".router" not in name for name in trip.dense)
    assert trip.by_us < MOST


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_transformers_loads_what_was_found_out(model_type: str, tmp_path: Path) -> None:
    difference = round_trip(model_type, tmp_path, by_transformers=True).by_transformers
    assert isinstance(difference, float)
    assert difference < MOST


# What community checkpoints of the time of AutoGPTQ and vLLM call an expert's linear.
COMMUNITY = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2",
    "qwen2_moe": "model.layers.1.mlp.experts.3.down_proj",
    "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.down_proj",
    "phimoe": "model.layers.1.block_sparse_moe.experts.3.w2",
}


@pytest.mark.parametrize(("model_type", "expert"), COMMUNITY.items(), ids=COMMUNITY)
def test_old_layouts_with_one_tensor_per_expert_are_written_and_loaded(
    model_type: str, expert: str, tmp_path: Path
) -> None:
    """The file is rewritten with only the community's names: nothing else may be needed."""
    assert round_trip(model_type, tmp_path).by_us < MOST
    tensors = load_file(tmp_path / WEIGHTS)
    assert {f"{expert}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")} <= set(tensors)
    assert not any("gate_up_proj" in name for name in tensors)
    for name in [name for name in tensors if ".g_idx" in name]:  # some tools leave it out
        del tensors[name]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")
    assert torch.isfinite(loaded(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        # Neither in the order of running nor named like anything known.
        self.shrink = nn.Linear(2 * size, size)
        self.left, self.right = nn.Linear(size, 2 * size, bias=False), nn.Linear(size, 2 * size)
        self.mix = nn.Linear(size, size)
        self.unused = nn.Linear(size, size)
        self.odd = nn.Linear(size, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).cumsum(1) / x.shape[1]
        return x + self.shrink(torch.tanh(self.left(x)) * self.right(x)) + self.odd(x).sum(-1, True)


class HandWritten(nn.Module):
    """A model of nobody's library: its forward knows neither masks nor caches."""

    def __init__(self, size: int = 64, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.words = nn.Embedding(256, size)
        self.tower = nn.Sequential(*(kind(size) for _ in range(3)))
        self.out = nn.Linear(size, 256)
        self.config = type("Config", (), {"model_type": "nobodys", "vocab_size": 256})()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.tower(self.words(input_ids)))


@torch.no_grad()
def test_a_hand_written_model_is_discovered_and_quantized_without_code() -> None:
    model = HandWritten()
    row = discover(model)
    assert (row.blocks, row.head) == ("tower", "lm_head")
    assert row.steps == ("mix", "left right odd", "shrink")  # what reads alike, in order of running
    ids = tiny_examples(1)[0]["input_ids"][None]
    before = model(ids)
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(bits=8, group_size=32))  # type: ignore[arg-type]
    wrapper.quantize(tiny_examples())
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    inside = {"mix", "left", "right", "shrink"}
    assert packed == {f"tower.{i}.{name}" for i in range(3) for name in inside}
    after = model(ids)
    assert 0 < float((after - before).norm()) < 0.02 * float(before.norm())
    dequantize(model, torch.float32)
    assert (model(ids) - after).abs().max() < MOST * after.abs().max()


def test_a_model_without_repeated_linears_is_refused_by_name() -> None:
    class NoLinears(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(size)

    with pytest.raises(UnsupportedModelError, match="HandWritten isn't supported yet: it has no"):
        discover(HandWritten(kind=NoLinears))


def test_a_row_of_the_table_says_what_is_discovered() -> None:
    """Llama's row and what running Llama shows are the same, but for the order within a step."""
    model = tiny_model()
    found = discover(model)
    row = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig()).architecture
    assert found.blocks == row.blocks
    assert [set(step.split()) for step in found.steps] == [set(s.split()) for s in row.steps]
    assert (
        Architecture.from_class_attributes(
            type("Own", (), found.as_class_attributes("llama")), "llama"
        ).steps
        == found.steps
    )


def test_odd_shapes_get_settings_that_readers_understand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """64 inputs are less than a group of 96; 80 outputs do not fill words."""
    model = tiny_model(intermediate_size=96, head_dim=20)  # q: 80 outputs, k and v: 40
    settings = BaseQuantizeConfig(bits=4, group_size=96)
    wrapper = BaseGPTQForCausalLM(model, False, settings)
    with caplog.at_level(logging.WARNING):
        wrapper.quantize(tiny_examples())
    assert "8 linears stay in full precision" in caplog.text
    assert "group_size=96 is more than the inputs of 4 linears" in caplog.text
    assert settings.dynamic is None  # the user's own object is left alone
    wrapper.save_quantized(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["dynamic"] == {
        rf"-:model\.layers\.\d+\.self_attn\.{name}_proj$": {} for name in ("k", "v", "q", "o")
    } | {rf"+:model\.layers\.\d+\.mlp\.{n}_proj$": {"group_size": -1} for n in ("gate", "up")}
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu").model
    assert loaded.model.layers[1].mlp.down_proj.scales.shape[0] == 1
    assert loaded.model.layers[1].mlp.up_proj.scales.shape[0] == 1
    assert type(loaded.model.layers[1].self_attn.q_proj) is nn.Linear


def test_a_short_last_group_is_kept_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SmolLM2 has 576 inputs; its groups of 128 once became groups of 64, with more scales."""
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(bits=4, group_size=64))
    with caplog.at_level(logging.WARNING):
        wrapper.quantize(tiny_examples())
    assert "group_size=64 does not divide the inputs of 2 linears" in caplog.text
    assert wrapper.model.model.layers[0].mlp.down_proj.scales.shape[0] == 2  # of 64 and 32 inputs
    wrapper.save_quantized(tmp_path)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert not config.get("dynamic")


def _routed_to(model: Any, experts: list[int]) -> None:
    """Make the router of the first block send every token to these two experts."""
    router = next(m for m in model.modules() if type(m).__name__ == "MixtralTopKRouter")
    with torch.no_grad():
        router.weight.zero_()
        model.model.layers[0].post_attention_layernorm.weight.fill_(1)
        hidden = model.model.embed_tokens.weight
        hidden[:, 0] = 10  # a direction that all tokens have
        for expert in experts:
            router.weight[expert, 0] = 1


@pytest.mark.parametrize("share", [0.25, 0.0, 1e9], ids=["default", "none", "all"])
def test_a_starved_expert_is_reported_and_not_zeroed(
    share: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_of("mixtral")
    _routed_to(model, [0, 2])
    dense = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    config = BaseQuantizeConfig(group_size=32, desc_act=False, expert_share=share)
    wrapper = BaseGPTQForCausalLM(model, False, config)
    with caplog.at_level(logging.WARNING):
        wrapper.quantize(tiny_examples(4, 32), batch_size=2)
    assert "model.layers.0.mlp.experts: of 4 experts 2 got less than" in caplog.text
    assert "1 (0), 3 (0)" in caplog.text
    entries = {entry.name: entry for entry in wrapper.report}
    name = "model.layers.0.mlp.experts.{}.w2"
    assert [entries[name.format(e)].routed for e in range(4)] == [128, 0, 128, 0]
    # Even routing of 128 tokens to 2 of 4 experts: 64 each; of two batches a quarter is 8 each.
    least = {0.25: 16, 0.0: 0, 1e9: 128}[share]
    assert entries[name.format(1)].tokens == least
    assert entries["model.layers.0.self_attn.q_proj"].routed is None
    for expert in range(4):
        weight = wrapper.model.get_submodule(name.format(expert)).weight
        lost = (weight - dense[expert]).norm() / dense[expert].norm()
        assert lost < 0.25, expert  # of 4 bits and 32 columns: about 0.1


def test_experts_of_a_layer_are_all_packed_or_all_dense(caplog: pytest.LogCaptureFixture) -> None:
    dynamic: dict[str, dict[str, Any]] = {r"-:.*layers\.1\..*experts\.2\.w1": {}}
    config = BaseQuantizeConfig(group_size=32, dynamic=dynamic)
    wrapper = BaseGPTQForCausalLM(tiny_of("mixtral"), False, config)
    wrapper.quantize(tiny_examples(2, 24))
    packed = [n for n, m in wrapper.model.named_modules() if isinstance(m, QuantLinear)]
    assert sum(".0.mlp.experts" in name for name in packed) == 12
    assert sum(".1.mlp.experts" in name for name in packed) == 0


# What sees or hears: all but the part that makes text has to come back in every bit.
SEEING = {
    "gemma3": True,  # takes an image here; False: text alone
    "qwen3_5": False,  # transformers has a text model under the same configuration
    "step3p7": True,  # q, k and v of the vision tower are one tensor on disk
    "qwen3_vl_moe": False,  # experts of the language tower
    "blip": True,  # each input has an image
    "voxtral": False,  # hears
}


@pytest.mark.parametrize(("model_type", "image"), SEEING.items(), ids=SEEING)
def test_of_what_sees_or_hears_only_the_part_that_makes_text_is_packed(
    model_type: str, image: bool, tmp_path: Path
) -> None:
    trip = round_trip(model_type, tmp_path, by_transformers=True, auto=SENSES)
    assert trip.sighted == image
    assert trip.by_us < MOST
    assert isinstance(trip.by_transformers, float), trip.by_transformers
    assert trip.by_transformers < MOST
    assert not re.search(r"vision|visual|audio", trip.blocks)


def test_a_model_that_sees_takes_a_processors_batches(tmp_path: Path) -> None:
    model = tiny_of("gemma3")
    example = sighted(model)
    assert example is not None
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
    wrapper.quantize([example, *tiny_examples(2, 24)])
    packed = [n for n, m in wrapper.model.named_modules() if isinstance(m, QuantLinear)]
    assert len(packed) == 14
    assert not any("vision" in name for name in packed)
    assert {entry.tokens for entry in wrapper.report} == {example["input_ids"].numel() + 2 * 24}
    wrapper.save_quantized(tmp_path)
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")
    found = loaded(**example).logits
    wanted = wrapper(**example).logits
    assert (found - wanted).abs().max() < MOST * wanted.abs().max()


def test_a_run_is_not_gone_on_with_on_other_images(tmp_path: Path) -> None:
    """Images were once left out of what tells one run from another."""
    model = tiny_of("gemma3")
    example = sighted(model)
    assert example is not None

    def quantize(**changed: Tensor) -> None:
        wrapper = BaseGPTQForCausalLM(
            copy.deepcopy(model), False, BaseQuantizeConfig(group_size=32)
        )
        wrapper.quantize([example | changed], work_dir=tmp_path)

    quantize()
    with pytest.raises(ConfigError, match="differs in examples"):
        quantize(pixel_values=example["pixel_values"] + 0.1)
    quantize()  # with those of the first time
