"""Bad input: a message that names it, before anything is changed, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.checkpoint import writer
from auto_gptq.errors import (
    CheckpointError,
    ConfigError,
    ExamplesError,
    MissingFileError,
    ModuleShapeError,
    NumericsError,
    UnsupportedModelError,
)
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from tests.tiny import tiny_examples, tiny_model

WEIGHTS = "gptq_model-4bit-32g.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(bits=4, group_size=32))
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(folder)
    return folder


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(good, tmp_path / "broken")


def _load(folder: Path, **kwargs: Any) -> BaseGPTQForCausalLM:
    return AutoGPTQForCausalLM.from_quantized(folder, device="cpu", **kwargs)


def _edit(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits is 5; it must be 2, 3, 4 or 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": -2}, "group_size is -2"),
        ({"damp_percent": 0.0}, "damp_percent is 0.0"),
        ({"damp_percent": 1}, "damp_percent is 1"),
        # As JSON files may have it: 4.0 failed in a shift, "false" counted as true.
        ({"bits": 4.0}, "bits is 4.0"),
        ({"damp_percent": "0.01"}, "damp_percent is '0.01'"),
        ({"scale_epochs": 1.5}, "scale_epochs is 1.5; it must be a whole number"),
        ({"desc_act": "false"}, "desc_act is 'false'; it must be True or False"),
        ({"quant_method": "bnb"}, "quant_method is 'bnb'"),
        ({"checkpoint_format": "gemm"}, "'gemm' does not go with quant_method 'gptq'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BaseQuantizeConfig(**settings)
    with pytest.raises(ValueError, match=message):  # what AutoGPTQ raised
        BaseQuantizeConfig(**settings)


@pytest.mark.parametrize(
    ("pattern", "override", "message"),
    [
        (r".*q_proj", {"group_size": 128}, r"q_proj maps 64 inputs to .* group_size=128.*most 64"),
        (r".*up_proj", {"bits": 8}, r"mlp.up_proj maps 64 inputs to 100 outputs.*multiples"),
    ],
    ids=["group too large", "not a multiple of 32"],
)
def test_a_layer_named_by_the_user_that_cannot_be_packed_is_refused_before_anything_is_changed(
    pattern: str, override: dict[str, int], message: str
) -> None:
    model = tiny_model(intermediate_size=100)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = BaseQuantizeConfig(group_size=32, dynamic={pattern: override})
    wrapper = BaseGPTQForCausalLM(model, False, config)
    with pytest.raises(ModuleShapeError, match=message):
        wrapper.quantize(tiny_examples())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not wrapper.quantized


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, "int32", 16], ids=str
)
def test_no_model_is_loaded_in_what_cannot_be_computed_in(good: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="torch_dtype is"):
        _load(good, torch_dtype=dtype)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"), [(5, 32, "bits is 5"), (4, 0, "group_size is 0")]
)
def test_no_layer_is_made_of_what_cannot_be_packed(
    bits: int, group_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantLinear(bits, group_size, 64, 64, bias=False)


def test_bad_examples_change_nothing() -> None:
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(group_size=32))
    with pytest.raises(ExamplesError, match="examples is empty"):
        wrapper.quantize([])
    with pytest.raises(ExamplesError, match="0 to 255"):
        wrapper.quantize([{"input_ids": [999], "attention_mask": [1]}])
    assert not wrapper.quantized


def test_a_group_size_that_fits_no_linear_is_refused_before_anything_is_changed() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=1024))
    with pytest.raises(ModuleShapeError, match=r"group_size=1024 fits no linear.*at most 96"):
        wrapper.quantize(tiny_examples())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_weights_and_activations_name_the_module() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
    with pytest.raises(NumericsError, match=r"model\.layers\.1: mlp\.down_proj: The weight holds"):
        wrapper.quantize(tiny_examples())
    model = tiny_model()
    model.model.embed_tokens.weight.data[:] = float("inf")
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
    with pytest.raises(NumericsError, match="before the first block"):
        wrapper.quantize(tiny_examples())


def test_a_model_type_that_makes_no_text_is_a_type_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for load in (
        lambda: AutoGPTQForCausalLM.from_pretrained(tmp_path, BaseQuantizeConfig()),
        lambda: AutoGPTQForCausalLM.from_quantized(tmp_path),
    ):
        with pytest.raises(TypeError, match="vit isn't supported yet") as caught:
            load()
        assert isinstance(caught.value, UnsupportedModelError)


def test_a_missing_weight_file_lists_the_names_tried(broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    (broken / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS}, .*, model.safetensors") as caught:
        _load(broken)
    assert isinstance(caught.value, MissingFileError)
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors"):
        _load(broken, model_basename="other")


def test_a_missing_shard_is_named(broken: Path) -> None:
    (broken / WEIGHTS).rename(broken / "elsewhere")
    with pytest.raises(MissingFileError, match=f"names the file {WEIGHTS}, which is missing"):
        _load(broken)


def test_a_missing_configuration_is_named(broken: Path) -> None:
    (broken / "quantize_config.json").unlink()
    assert _load(broken).quantize_config.bits == 4  # config.json has it, too
    config = json.loads((broken / "config.json").read_text())
    del config["quantization_config"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="no quantization configuration"):
        _load(broken)
    assert _load(broken, quantize_config={"bits": 4, "group_size": 32}).quantize_config.desc_act
    (broken / "quantize_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        _load(broken)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(broken: Path, kept: int) -> None:
    file = broken / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read: it is truncated"):
        _load(broken)


def test_missing_tensors_are_named(broken: Path) -> None:
    _edit(
        broken, lambda tensors: [tensors.pop(f"{LAYER}.scales"), tensors.pop("model.norm.weight")]
    )
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors: .*q_proj\.scales.*model\.norm"):
        _load(broken)


def test_g_idx_may_be_missing_only_where_groups_are_contiguous(broken: Path) -> None:
    _edit(broken, lambda tensors: tensors.pop(f"{LAYER}.g_idx"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: .*g_idx"):
        _load(broken)
    settings = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    assert _load(broken, quantize_config=settings).quantized


@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_misshapen_tensor_is_named(broken: Path, tensor: str) -> None:
    name = f"{LAYER}.{tensor}"
    _edit(broken, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=f"{name} has shape .*ask for"):
        _load(broken)


def test_settings_of_another_checkpoint_do_not_fit(broken: Path) -> None:
    with pytest.raises(CheckpointError, match=r"qweight has shape .*bits, group_size"):
        _load(broken, quantize_config={"bits": 8, "group_size": 32}, model_basename=WEIGHTS[:-12])


def test_a_group_out_of_range_and_nan_scales_are_named(broken: Path) -> None:
    _edit(broken, lambda tensors: tensors[f"{LAYER}.g_idx"].__setitem__(0, 7))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.g_idx names groups 0 to 7.* 2 groups"):
        _load(broken)
    _edit(broken, lambda tensors: tensors[f"{LAYER}.g_idx"].__setitem__(0, 0))
    _edit(broken, lambda tensors: tensors[f"{LAYER}.scales"].__setitem__((0, 0), float("nan")))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.scales holds NaN"):
        _load(broken)


def test_an_index_cannot_lead_out_of_the_folder(broken: Path) -> None:
    for name in ("../secret.safetensors", "/etc/passwd", "..\\secret"):
        index = {"weight_map": {"a": name}}
        (broken / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="outside of the checkpoint"):
            _load(broken)


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("code from a pickle ran",))


def test_code_in_a_pickle_is_not_run(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": _Code()}, broken / "gptq_model-4bit-32g.bin")
    with pytest.raises(CheckpointError, match=r"32g\.bin cannot be read safely"):
        _load(broken, use_safetensors=False)
    assert "code" not in capsys.readouterr().out


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(
    good: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = _load(good)
    before = {path.name: path.read_bytes() for path in broken.iterdir()}

    def full_disk(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_file", full_disk)
    for folder in (broken, broken / "new"):
        with pytest.raises(OSError, match="No space left"):
            wrapper.save_quantized(folder)
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before


def test_metadata_must_be_a_dict(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors_metadata is a list"):
        _load(good).save_quantized(tmp_path / "new", safetensors_metadata=["a"])  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
