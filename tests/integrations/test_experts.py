"""Mixtures of experts, whose checkpoints hold expert by expert, load with plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig

from auto_gptq.nn_modules.experts import unfuse
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize, empty_quant_linear, find_linears, replace
from tests.integrations.checkpoints import IDS, tensors_of
from tests.tiny import assert_same_logits
from tests.tiny_tokenizer import tiny_tokenizer
from tests.zoo_sizes import tiny_config

V5 = parse(transformers.__version__) >= parse("5")
# Model type → what its checkpoints call the module that transformers 5 calls otherwise.
TYPES = {
    "mixtral": (".mlp.", ".block_sparse_moe."),
    "qwen2_moe": None,
    "qwen3_moe": None,
    "deepseek_v3": None,
    "gpt_oss": None,
}
EXTRA = {"deepseek_v3": {"num_key_value_heads": 4, "qk_head_dim": 32}}
SETTINGS = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}


def tiny_moe(model_type: str) -> Any:
    config = tiny_config(model_type, **EXTRA.get(model_type, {}))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def pack(model: Any, dense: tuple[str, ...] = ()) -> None:
    """Round the linears of all blocks to nearest, but those whose names hold one of ``dense``."""
    unfuse(model)
    layers = []
    for name, linear in find_linears(model).items():
        skipped = name == "lm_head" or "router" in name or name.endswith("gate")
        if skipped or any(part in name for part in dense):
            continue
        weight = linear.weight.detach()
        if weight.shape[0] % 32 or weight.shape[1] % 32:
            continue
        groups = weight.view(len(weight), -1, 32)
        scales = (groups.abs().amax(-1) / 7.5).clamp(min=1e-6).half()
        codes = (groups / scales.float()[..., None]).round().add(8).clamp(0, 15).flatten(1)
        layer = empty_quant_linear(linear, 4, 32)
        g_idx = torch.arange(weight.shape[1]) // 32
        layer.pack_codes(codes, scales, torch.full_like(scales, 8), g_idx, linear.bias)
        layers.append((name, layer))
    replace(model, layers)


def write(model: Any, folder: Path, rename: tuple[str, str] | None) -> dict[str, Tensor]:
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    if rename is not None:
        tensors = {name.replace(*rename): tensor for name, tensor in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    return tensors


@pytest.fixture(params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    if request.param == "gpt_oss" and not V5:
        pytest.skip("transformers 4 neither parts GPT-OSS's experts nor says how they lie")
    return str(request.param)


def test_every_logit_is_that_of_the_dequantized_model(
    model_type: str, tmp_path: Path, device: torch.device
) -> None:
    model = tiny_moe(model_type)
    pack(model)
    written = write(model, tmp_path / "packed", TYPES[model_type] if V5 else None)
    assert any(".experts.3." in name and name.endswith("qweight") for name in written)
    dequantize(model, torch.float32)
    wanted = model(IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    count = sum(name.endswith("qweight") for name in written)
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == count
    assert_same_logits(loaded.to(device)(IDS.to(device)).logits.cpu(), wanted)

    loaded.to("cpu").save_pretrained(tmp_path / "saved")
    again = tensors_of(tmp_path / "saved")
    assert again.keys() == written.keys()
    for name in written:
        assert torch.equal(again[name], written[name]), name

    base = AutoModel.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    hidden = loaded(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(base(IDS).last_hidden_state, hidden, atol=1e-5)


def test_what_transformers_renames_gets_the_models_dtype_too(tmp_path: Path) -> None:
    """transformers 5.17 leaves the router, whose name changes on the way, as it was stored."""
    model = tiny_moe("mixtral")
    pack(model)
    write(model, tmp_path / "packed", TYPES["mixtral"] if V5 else None)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(IDS).logits.isfinite().all()


@pytest.mark.parametrize("dense", ["layers.0.", ".experts.1."])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"], indirect=True)
def test_experts_that_stayed_dense_are_loaded_as_well(
    dense: str, model_type: str, tmp_path: Path
) -> None:
    """One dense expert beside packed ones was once merged into a tensor that is no more."""
    model = tiny_moe(model_type)
    pack(model, dense=(dense,))
    write(model, tmp_path / "packed", TYPES[model_type] if V5 else None)
    dequantize(model, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert_same_logits(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.skipif(not V5, reason="transformers 4 has no fused experts, which are what is new")
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_are_quantized_while_loading_and_saved_one_by_one(
    model_type: str, tmp_path: Path
) -> None:
    full = tiny_moe(model_type)
    full.save_pretrained(tmp_path / "full")
    texts = ["What is measured is managed. " * 4] * 3
    config = GPTQConfig(bits=4, group_size=32, dataset=texts, tokenizer=tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", dtype=torch.float32, quantization_config=config
    )
    logits = model(IDS).logits
    assert 0 < (logits - full(IDS).logits).norm() / logits.norm() < 0.4
    model.save_pretrained(tmp_path / "packed")
    names = tensors_of(tmp_path / "packed")
    down = "block_sparse_moe.experts.3.w2" if model_type == "mixtral" else "experts.3.down_proj"
    assert any(name.endswith(f"{down}.qweight") for name in names)
    assert not any("gate_up_proj" in name for name in names)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(back(IDS).logits, logits)
