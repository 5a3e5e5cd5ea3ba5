"""Quantize, save, load, generate: every known layout, on tiny random models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.errors import QuantizedStateError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize
from tests.tiny import TINY, assert_same_logits, tiny_examples, tiny_model


def _quantized(model_type: str = "llama", **settings: Any) -> BaseGPTQForCausalLM:
    config = BaseQuantizeConfig(**{"bits": 4, "group_size": 32} | settings)
    wrapper = BaseGPTQForCausalLM(tiny_model(model_type), False, config)
    wrapper.quantize(tiny_examples(), batch_size=2)
    return wrapper


@pytest.mark.parametrize("model_type", TINY)
def test_a_loaded_model_computes_what_its_dequantized_twin_does(
    model_type: str, tmp_path: Path
) -> None:
    wrapper = _quantized(model_type)
    expected = len(wrapper.architecture.linear_names()) * 2  # blocks
    assert len(wrapper.report) == expected
    assert all(0 < entry.error < 0.05 for entry in wrapper.report)
    wrapper.save_quantized(tmp_path / "quantized")
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path / "quantized", device="cpu")
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == expected

    twin = copy.deepcopy(loaded.model)
    dequantize(twin, torch.float32)
    ids = tiny_examples(2)[0]["input_ids"][None]
    found, wanted = loaded(input_ids=ids).logits, twin(input_ids=ids).logits
    assert_same_logits(found, wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_saved_and_loaded_weights_are_the_solved_ones(
    bits: int, sym: bool, group_size: int, checkpoint_format: str, tmp_path: Path
) -> None:
    wrapper = _quantized(
        bits=bits, sym=sym, group_size=group_size, checkpoint_format=checkpoint_format
    )
    wrapper.save_quantized(tmp_path)
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")
    there = dict(wrapper.model.named_modules())
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(layer.weight, there[name].weight), name


def test_quantizing_8_bits_hardly_changes_the_logits() -> None:
    model = tiny_model().float()
    ids = tiny_examples(1)[0]["input_ids"][None]
    before = model(input_ids=ids).logits
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(bits=8, group_size=32))
    wrapper.quantize(tiny_examples())
    after = wrapper(input_ids=ids).logits
    assert (after - before).norm() < 0.01 * before.norm()


def test_generation_runs_and_starts_with_the_prompt(tmp_path: Path, device: torch.device) -> None:
    _quantized().save_quantized(tmp_path)
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device=device)
    prompt = torch.tensor([[5, 6, 7]], device=device)
    output = loaded.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape == (1, 7)
    assert torch.equal(output[:, :3], prompt)
    on_cpu = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")
    wanted = on_cpu(input_ids=prompt.cpu()).logits
    assert (loaded(input_ids=prompt).logits.cpu() - wanted).norm() < 0.01 * wanted.norm()


def test_saved_files_are_those_of_autogptq_and_can_be_found_by_transformers(tmp_path: Path) -> None:
    _quantized(static_groups=True).save_quantized(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "gptq_model-4bit-32g.safetensors",
        "model.safetensors.index.json",
        "quantization_report.csv",  # ours, after a run of quantize()
        "quantization_report.json",
        "quantize_config.json",
    ]
    tensors = load_file(tmp_path / "gptq_model-4bit-32g.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors)
    settings = json.loads((tmp_path / "quantize_config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == settings
    assert list(settings) == [
        "bits",
        "group_size",
        "damp_percent",
        "desc_act",
        "static_groups",
        "sym",
        "true_sequential",
        "model_name_or_path",
        "model_file_base_name",
        "quant_method",
        "checkpoint_format",
    ]
    # The order left no trace in g_idx; vLLM refuses what says otherwise.
    assert settings["desc_act"] is False
    assert not any(name.endswith("proj.weight") for name in tensors)


def test_saving_again_gives_the_same_tensors_and_metadata(tmp_path: Path) -> None:
    wrapper = _quantized(bits=3, sym=False)
    wrapper.save_quantized(tmp_path / "first")
    loaded = AutoGPTQForCausalLM.from_quantized(
        tmp_path / "first", device="cpu", torch_dtype=torch.float16
    )
    loaded.save_quantized(tmp_path / "second")
    name = "gptq_model-3bit-32g.safetensors"
    with (
        safe_open(tmp_path / "first" / name, "pt") as first,
        safe_open(tmp_path / "second" / name, "pt") as second,
    ):
        assert first.metadata() == second.metadata()
        assert first.metadata()["gptq_bits"] == "3"
        assert set(first.keys()) == set(second.keys())
        for key in first.keys():  # noqa: SIM118 (not a dict)
            there, here = first.get_tensor(key), second.get_tensor(key)
            assert here.dtype == there.dtype, key
            assert torch.equal(here, there), key


def test_torch_files_are_written_and_read_too(tmp_path: Path) -> None:
    wrapper = _quantized()
    wrapper.save_quantized(tmp_path, use_safetensors=False)
    assert (tmp_path / "gptq_model-4bit-32g.bin").is_file()
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu", use_safetensors=False)
    ids = torch.tensor([[5, 6, 7]])
    wrapper.model.float()
    assert torch.equal(loaded(input_ids=ids).logits, wrapper(input_ids=ids).logits)


def test_model_name_is_found_when_saved_as_model(tmp_path: Path) -> None:
    _quantized(model_file_base_name="model").save_quantized(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")
    assert loaded.quantize_config.model_file_base_name == "model"


def test_padding_does_not_enter_the_hessian() -> None:
    torch.manual_seed(1)
    model = tiny_model()
    examples = tiny_examples(4, 24)
    short = [{key: row[:16] for key, row in example.items()} for example in examples[:2]]
    settings = BaseQuantizeConfig(bits=4, group_size=32)
    results = []
    for batch_size in (1, 4):  # one by one nothing is padded
        wrapper = BaseGPTQForCausalLM(copy.deepcopy(model), False, settings)
        wrapper.quantize(short + examples[2:], batch_size=batch_size)
        assert {entry.tokens for entry in wrapper.report} == {2 * 16 + 2 * 24}
        results.append(wrapper.report)
    for alone, padded in zip(*results, strict=True):
        assert padded.error == pytest.approx(alone.error, rel=0.05)


def test_what_a_model_is_made_of_comes_back_as_it_was() -> None:
    """Blocks run in fp32 on a CPU; afterwards norms and embeddings are float16 again."""
    model = tiny_model()
    norms = {n: p.clone() for n, p in model.named_parameters() if "norm" in n or "embed" in n}
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(bits=4, group_size=32))
    wrapper.quantize(tiny_examples())
    assert norms
    now = dict(wrapper.model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in norms.items())
    assert not any("forward" in module.__dict__ for module in wrapper.model.modules())


def test_quantizing_twice_and_saving_too_early_are_refused(tmp_path: Path) -> None:
    wrapper = _quantized()
    with pytest.raises(QuantizedStateError, match="quantized already"):
        wrapper.quantize(tiny_examples())
    fresh = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig())
    with pytest.raises(EnvironmentError, match="not quantized yet"):
        fresh.save_quantized(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_unknown_attributes_fall_through_to_the_model() -> None:
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig())
    assert wrapper.lm_head is wrapper.model.lm_head
    assert wrapper.dtype == torch.float16
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing


def test_from_pretrained_reads_a_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    wrapper = AutoGPTQForCausalLM.from_pretrained(tmp_path, BaseQuantizeConfig(group_size=32))
    assert wrapper.model.dtype == torch.float16
    assert wrapper.seqlen == wrapper.config.max_position_embeddings
    assert not wrapper.quantized
