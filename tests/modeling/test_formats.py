"""Checkpoints in every layout: read, written, and read again without a changed bit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.errors import CheckpointError, ConfigError, ModuleShapeError
from auto_gptq.formats.gptq import convert_zeros, unpack_codes, unpack_zeros
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from tests.reference import plain_awq_pack
from tests.tiny import tiny_examples, tiny_model

WEIGHTS = "gptq_model-4bit-128g.safetensors"
LAYER = "model.layers.1.mlp.down_proj"
# Wide enough for Marlin, whose layers map multiples of 128 inputs to multiples of 256 outputs.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}


def _quantized(model: dict[str, Any] | None = None, **settings: Any) -> BaseGPTQForCausalLM:
    wide = WIDE if model is None else model
    config = BaseQuantizeConfig(**{"bits": 4, "group_size": 128, "desc_act": False} | settings)
    wrapper = BaseGPTQForCausalLM(tiny_model(num_hidden_layers=2, **wide), False, config)
    wrapper.quantize(tiny_examples())
    return wrapper


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v1")
    _quantized().save_quantized(folder)
    return folder


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AWQ checkpoint as AutoAWQ writes it, with biases, zero points of 0, and no g_idx."""
    folder = tmp_path_factory.mktemp("awq")
    model = tiny_model("qwen2", num_hidden_layers=2)
    tensors = {
        name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"
    }
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        prefix = name.removesuffix("weight")
        tensors[f"{prefix}qweight"] = plain_awq_pack(torch.randint(0, 16, (inputs, outputs)))
        tensors[f"{prefix}qzeros"] = plain_awq_pack(torch.randint(0, 16, (inputs // 32, outputs)))
        tensors[f"{prefix}scales"] = (torch.rand(inputs // 32, outputs) / 100 + 0.001).half()
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _load(folder: Path, **kwargs: Any) -> BaseGPTQForCausalLM:
    kwargs = {"torch_dtype": torch.float16} | kwargs
    return AutoGPTQForCausalLM.from_quantized(folder, device="cpu", **kwargs)


def _weights(wrapper: BaseGPTQForCausalLM) -> dict[str, Tensor]:
    layers = wrapper.model.named_modules()
    return {name: layer.weight for name, layer in layers if isinstance(layer, QuantLinear)}


def _same_weights(one: BaseGPTQForCausalLM, other: BaseGPTQForCausalLM) -> bool:
    here, there = _weights(one), _weights(other)
    return here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)


def _edit(folder: Path, edit: Any, file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def test_saving_twice_gives_the_same_bytes(v1: Path, tmp_path: Path) -> None:
    wrapper = _load(v1)
    wrapper.save_quantized(tmp_path / "again", safetensors_metadata={"who": "me", "when": "now"})
    wrapper.save_quantized(tmp_path / "third", safetensors_metadata={"when": "now", "who": "me"})
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "third" / path.name).read_bytes(), path.name
        if path.name != WEIGHTS:  # which holds the metadata given here
            assert path.read_bytes() == (v1 / path.name).read_bytes(), path.name
    wrapper.save_quantized(tmp_path / "plain")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (v1 / WEIGHTS).read_bytes()


@pytest.mark.parametrize("target", ["gptq_v2", "marlin"])
def test_there_and_back_changes_no_byte(target: str, v1: Path, tmp_path: Path) -> None:
    wrapper = _load(v1)
    wrapper.save_quantized(tmp_path / target, checkpoint_format=target)
    settings = json.loads((tmp_path / target / "quantize_config.json").read_text())
    assert settings["checkpoint_format"] == target
    assert wrapper.quantize_config.checkpoint_format == "gptq"
    there = _load(tmp_path / target)
    assert there.quantize_config.checkpoint_format == target
    assert _same_weights(there, wrapper)
    there.save_quantized(tmp_path / "same")
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (tmp_path / target / WEIGHTS).read_bytes()
    there.save_quantized(tmp_path / "back", checkpoint_format="gptq")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (v1 / WEIGHTS).read_bytes()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
@pytest.mark.parametrize("held", ["gptq", "gptq_v2", "marlin", "awq"])
def test_what_transformers_saves_of_the_inner_model_is_whole(
    held: str, v1: Path, awq: Path, tmp_path: Path
) -> None:
    """It lacked ``quantization_config``, so that transformers made new weights of it."""
    from transformers import AutoModelForCausalLM

    source, out = awq if held == "awq" else tmp_path / held, tmp_path / "out"
    if held != "awq":
        _load(v1).save_quantized(source, checkpoint_format=held)
    wrapper = _load(source)
    wrapper.model.save_pretrained(out)
    tokens = torch.tensor([[1, 2, 3, 4]])
    wanted = wrapper(input_ids=tokens).logits
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    for found in (theirs, _load(out)):
        assert torch.equal(found(input_ids=tokens).logits, wanted)


def test_v2_and_marlin_files_hold_what_they_should(v1: Path, tmp_path: Path) -> None:
    for target in ("gptq_v2", "marlin"):
        _load(v1).save_quantized(tmp_path / target, checkpoint_format=target)
    first, second, third = (
        load_file(folder / WEIGHTS) for folder in (v1, tmp_path / "gptq_v2", tmp_path / "marlin")
    )
    zeros = convert_zeros(first[f"{LAYER}.qzeros"], 4, source="gptq", target="gptq_v2")
    assert torch.equal(second[f"{LAYER}.qzeros"], zeros)
    leaves = {name.removeprefix(f"{LAYER}.") for name in third if name.startswith(LAYER)}
    assert leaves == {"B", "s"}
    assert (third[f"{LAYER}.B"].shape, third[f"{LAYER}.s"].shape) == ((16, 512), (2, 256))


@pytest.mark.parametrize(
    "named",
    [
        {"is_marlin_format": True},
        {"quant_method": "marlin"},
        {"checkpoint_format": "marlin"},
        {},  # nobody says so but the tensors
    ],
    ids=lambda named: next(iter(named), "unsaid"),
)
@pytest.mark.parametrize("group_size", [128, -1])
def test_marlin_is_recognised_whatever_it_is_called(
    named: dict[str, Any], group_size: int, tmp_path: Path
) -> None:
    wrapper = (
        _quantized(group_size=group_size, checkpoint_format="marlin", desc_act=True)
        if (group_size == -1)
        else _quantized(checkpoint_format="marlin")
    )
    wrapper.save_quantized(tmp_path)
    assert _same_weights(_load(tmp_path), wrapper)
    settings = {"bits": 4, "group_size": group_size, "sym": True} | named
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    assert _same_weights(_load(tmp_path), wrapper)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "8 bits; Marlin holds 4"),
        ({"sym": False}, "asymmetric"),
        ({"group_size": 64}, "group_size is 64"),
        ({"desc_act": True}, "scatters its groups"),
        ({"model": {}, "group_size": -1}, "maps 64 inputs to"),
    ],
    ids=["bits", "sym", "group_size", "desc_act", "shape"],
)
def test_what_marlin_cannot_hold_is_refused_before_and_after_quantizing(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModuleShapeError, match=rf"layers\.0\.\S+ cannot be saved.*{message}"):
        _quantized(**change, checkpoint_format="marlin")
    message = message.replace("scatters its groups", "groups are scattered")
    wrapper = _quantized(**change)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.\S+ cannot be saved.*{message}"):
        wrapper.save_quantized(tmp_path / "new", checkpoint_format="marlin")
    assert not (tmp_path / "new").exists()


def test_an_unknown_target_is_refused(v1: Path, tmp_path: Path) -> None:
    for name in ("gemm", "exl2"):
        with pytest.raises(ConfigError, match=f"checkpoint_format is '{name}'"):
            _load(v1).save_quantized(tmp_path / "new", checkpoint_format=name)
    with pytest.raises(ConfigError, match="max_shard_size is 'big'"):
        _load(v1).save_quantized(tmp_path / "new", max_shard_size="big")
    assert not (tmp_path / "new").exists()


def test_awq_is_read_without_a_changed_bit(awq: Path) -> None:
    loaded, stored = _load(awq), load_file(awq / "model.safetensors")
    assert loaded.quantize_config.sym is False
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        codes, zeros = unpack_codes(layer.qweight, 4), unpack_zeros(layer.qzeros, 4, 0)
        assert layer.checkpoint_format == "gptq_v2"
        assert torch.equal(plain_awq_pack(codes), stored[f"{name}.qweight"])
        assert torch.equal(plain_awq_pack(zeros), stored[f"{name}.qzeros"])
        assert torch.equal(layer.scales, stored[f"{name}.scales"])
        assert torch.equal(layer.g_idx, torch.arange(layer.in_features).int() // 32)
        assert (layer.bias is not None) == (f"{name}.bias" in stored)


def test_awq_is_saved_as_gptq_if_that_can_hold_it(
    awq: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrapper = _load(awq)
    with caplog.at_level(logging.INFO, logger="auto_gptq"):
        wrapper.save_quantized(tmp_path / "v2")
    assert "saving as 'gptq_v2'" in caplog.text
    settings = json.loads((tmp_path / "v2" / "quantize_config.json").read_text())
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (settings["sym"], settings["desc_act"]) == (False, False)
    assert _same_weights(_load(tmp_path / "v2"), wrapper)
    with pytest.raises(CheckpointError, match=r"layers\.0\.\S+ has \d+ zero points of 0"):
        wrapper.save_quantized(tmp_path / "v1", checkpoint_format="gptq")

    shutil.copytree(awq, tmp_path / "no zeros of 0")
    _edit(
        tmp_path / "no zeros of 0",
        lambda tensors: [t.fill_(0x1234567F) for n, t in tensors.items() if "qzeros" in n],
        "model.safetensors",
    )
    wrapper = _load(tmp_path / "no zeros of 0")
    wrapper.save_quantized(tmp_path / "v1")
    assert json.loads((tmp_path / "v1" / "quantize_config.json").read_text()) == settings | {
        "checkpoint_format": "gptq"
    }
    assert _same_weights(_load(tmp_path / "v1"), wrapper)


@pytest.mark.parametrize("version", ["gemv", "GEMV_FAST", "llm-awq", "exllama"])
def test_other_layouts_of_awq_are_refused_by_name(version: str) -> None:
    for settings in (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": version},
        {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": version},
    ):
        with pytest.raises(ConfigError, match=f"AWQ's layout '{version.lower()}'"):
            BaseQuantizeConfig.from_quant_config(settings)


def test_awq_settings_in_every_spelling() -> None:
    for settings in (
        {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        {"zero_point": True, "group_size": 64, "bits": 4, "quant_method": "awq"},
        {"group_size": 64, "bits": 4, "quant_method": "AWQ", "checkpoint_format": "gemm"},
    ):
        found = BaseQuantizeConfig.from_quant_config(settings)
        assert (found.bits, found.group_size, found.sym, found.desc_act) == (4, 64, False, False)
        assert (found.quant_method, found.checkpoint_format) == ("awq", "gemm")
    with pytest.raises(ConfigError, match="AWQ checkpoint has 4 bits; the configuration says 8"):
        BaseQuantizeConfig.from_quant_config({"w_bit": 8, "version": "GEMM"})


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "marlin"])
@pytest.mark.parametrize("use_safetensors", [True, False], ids=["safetensors", "bin"])
def test_every_layout_comes_in_shards(
    checkpoint_format: str, use_safetensors: bool, v1: Path, tmp_path: Path
) -> None:
    wrapper = _load(v1)
    wrapper.save_quantized(
        tmp_path,
        use_safetensors=use_safetensors,
        checkpoint_format=checkpoint_format,
        max_shard_size="100KB",
    )
    suffix = "safetensors" if use_safetensors else "bin"
    shards = sorted(tmp_path.glob(f"*-of-*.{suffix}"))
    assert len(shards) > 3
    assert not (tmp_path / WEIGHTS).exists()
    assert _same_weights(_load(tmp_path, use_safetensors=use_safetensors), wrapper)
    if use_safetensors:
        indexes = [f"{name}.index.json" for name in (WEIGHTS, "model.safetensors")]
        assert len({(tmp_path / index).read_text() for index in indexes}) == 1


def test_awq_comes_in_shards(awq: Path, tmp_path: Path) -> None:
    tensors = load_file(awq / "model.safetensors")
    shutil.copy(awq / "config.json", tmp_path)
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):  # the tensors of a layer lie in different files
        save_file({n: t for n, t in tensors.items() if files[n] == file}, tmp_path / file)
    index = json.dumps({"weight_map": files})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert _same_weights(_load(tmp_path), _load(awq))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
def test_legacy_pt_files_are_read(zipped: bool, v1: Path, tmp_path: Path) -> None:
    """As GPTQ-for-LLaMa wrote them: a .pt of any name, without settings and without g_idx."""
    tensors = {n: t for n, t in load_file(v1 / WEIGHTS).items() if not n.endswith("g_idx")}
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=zipped)
    shutil.copy(v1 / "config.json", tmp_path)
    loaded = _load(
        tmp_path,
        use_safetensors=False,
        model_basename="old",
        quantize_config=BaseQuantizeConfig(bits=4, group_size=128, desc_act=False),
    )
    assert _same_weights(loaded, _load(v1))
    (tmp_path / "old.pt").write_bytes(b"")  # nothing of the file is still needed
    loaded.save_quantized(tmp_path / "new")
    assert _same_weights(_load(tmp_path / "new"), _load(v1))


def test_int64_groups_and_zero_biases_of_old_tools_are_read(
    v1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(v1, tmp_path / "old")

    def age(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            tensors[name] = tensors[name].long()
            tensors[name.replace("g_idx", "bias")] = torch.zeros(256).half()

    _edit(folder, age)
    loaded = _load(folder)
    assert "Ignoring" not in caplog.text
    layer = loaded.model.get_submodule(LAYER)
    assert layer.bias is None
    assert layer.g_idx.dtype == torch.int32
    loaded.save_quantized(tmp_path / "new")
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == (v1 / WEIGHTS).read_bytes()
