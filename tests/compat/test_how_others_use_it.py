"""How third parties really call AutoGPTQ, each pattern on a tiny model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import auto_gptq
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig, exllama_set_max_input_length
from auto_gptq.modeling import _const, _utils
from auto_gptq.modeling._base import BaseGPTQForCausalLM
from auto_gptq.modeling._utils import autogptq_post_init, find_layers, make_quant, pack_model
from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.quantization import GPTQ
from auto_gptq.utils.import_utils import dynamically_import_QuantLinear
from tests.tiny import tiny_examples, tiny_model

SETTINGS = {"bits": 4, "group_size": 32}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Give a folder with a quantized model."""
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(**SETTINGS))
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def runs(model: Any) -> bool:
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    return logits.shape[:2] == (1, 3) and bool(torch.isfinite(logits).all())


def solved(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake-quantize a linear as optimum, OmniQuant and others do before they pack it."""
    gptq = GPTQ(linear)
    gptq.quantizer.configure(bits=4, sym=True, perchannel=True)
    gptq.add_batch(torch.randn(2, 40, linear.in_features), None)
    return gptq.fasterquant(percdamp=0.01, group_size=32, actorder=False)


def test_text_generation_webui(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        checkpoint,
        model_basename="gptq_model-4bit-32g",
        device="cpu",
        use_triton=False,
        inject_fused_attention=True,
        inject_fused_mlp=True,
        use_safetensors=True,
        trust_remote_code=False,
        max_memory=None,
        quantize_config=BaseQuantizeConfig(bits=4, group_size=32, desc_act=True),
        use_cuda_fp16=True,
        disable_exllama=False,
        disable_exllamav2=False,
    )
    assert model.model.model.embed_tokens.weight.shape == (256, 64)
    assert runs(model)


def test_the_bloke_model_card(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        str(checkpoint),
        model_basename="gptq_model-4bit-32g",
        revision="gptq-4bit-32g-actorder_True",
        use_safetensors=True,
        trust_remote_code=True,
        device="cpu",
        use_triton=False,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        quantize_config=None,
    )
    output = model.generate(
        input_ids=torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert output.shape == (1, 5)
    with pytest.raises(TypeError):
        model.generate(torch.tensor([[5, 6]]))


def test_minicpm_card_takes_methods_of_the_inner_model(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        checkpoint,
        torch_dtype=torch.bfloat16,
        device="cpu",
        trust_remote_code=True,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() > 0
    assert model.seqlen == model.config.max_position_embeddings
    assert str(model.device) == "cpu"
    assert model.hf_device_map == {"": "cpu"}


def test_lm_evaluation_harness(checkpoint: Path) -> None:
    """It passes on whatever a user says, and needs the wrapper to act as the model."""
    model = AutoGPTQForCausalLM.from_quantized(
        str(checkpoint),
        trust_remote_code=False,
        model_basename=None,
        use_safetensors=True,
        device_map={"": "cpu"},
        max_memory=None,
        offload_folder="./offload",
        gptq_use_triton=True,
    )
    model.eval()
    model.tie_weights()
    assert model.name_or_path is not None
    assert model.state_dict()
    assert runs(model)


def test_olive_sets_the_layout_on_the_instance(tmp_path: Path) -> None:
    inner = tiny_model("qwen3")
    inner.config.model_type = "a_type_of_its_own"
    cls = GPTQ_CAUSAL_LM_MODEL_MAP.get("a_type_of_its_own", BaseGPTQForCausalLM)
    assert cls is BaseGPTQForCausalLM
    config = BaseQuantizeConfig(**SETTINGS, model_file_base_name="model", desc_act=False)
    quantizer = cls(inner, False, config)
    quantizer.layers_block_name = "model.layers"
    quantizer.outside_layer_modules = ["model.embed_tokens", "model.norm"]
    quantizer.inside_layer_modules = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    quantizer.quantize(tiny_examples())
    quantizer.save_quantized(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == 4
    packed = [n for n, m in inner.named_modules() if isinstance(m, QuantLinear)]
    assert len(packed) == 2 * 3
    assert not any("v_proj" in name for name in packed)
    assert auto_gptq.__version__ >= "0.8.0"


def test_names_that_no_block_has_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Mixtral's old names fit nothing in transformers 5, where its experts are one parameter."""
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(**SETTINGS))
    wrapper.layers_block_name = "model.layers"
    wrapper.inside_layer_modules = [["self_attn.q_proj"], ["block_sparse_moe.experts.0.w1"]]
    wrapper.quantize(tiny_examples())
    assert "has block_sparse_moe.experts.0.w1; what takes their place" in caplog.text


def test_a_layout_said_by_half_is_refused() -> None:
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(**SETTINGS))
    wrapper.inside_layer_modules = [["self_attn.q_proj"]]
    with pytest.raises(ValueError, match="layers_block_name"):
        wrapper.quantize(tiny_examples())


class Customized(BaseGPTQForCausalLM):
    """What AutoGPTQ's README shows under "Customize Model"."""

    layers_block_name = "model.decoder.layers"
    outside_layer_modules = ["model.decoder.embed_tokens", "model.decoder.embed_positions"]
    inside_layer_modules = [
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
    ]


def test_a_customized_class_quantizes_and_loads_what_it_says(tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path / "dense")
    wrapper = Customized.from_pretrained(tmp_path / "dense", BaseQuantizeConfig(**SETTINGS))
    assert wrapper.layer_type is None
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(tmp_path / "quantized")
    loaded = Customized.from_quantized(tmp_path / "quantized", device="cpu")
    assert isinstance(loaded, Customized)
    block = loaded.model.model.decoder.layers[0]
    assert isinstance(block.fc1, QuantLinear)
    assert not isinstance(block.fc2, QuantLinear)


def renamed(folder: Path) -> None:
    """Give a saved model a type that transformers knows and this package does not."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    class Config(LlamaConfig):  # type: ignore[misc]
        model_type = "phi3_v"

    class Model(LlamaForCausalLM):  # type: ignore[misc]
        config_class = Config

    AutoConfig.register("phi3_v", Config, exist_ok=True)
    AutoModelForCausalLM.register(Config, Model, exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "phi3_v"}))


class Phi3V(BaseGPTQForCausalLM):
    layer_type = "LlamaDecoderLayer"
    layers_block_name = "model.layers"
    outside_layer_modules = ["model.embed_tokens", "model.norm"]
    inside_layer_modules = [["self_attn.q_proj"], ["mlp.down_proj"]]


def test_fms_mo_appends_to_the_list_and_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _const.SUPPORTED_MODELS is _utils.SUPPORTED_MODELS
    assert _const.SUPPORTED_MODELS is auto_gptq.modeling._base.SUPPORTED_MODELS
    tiny_model().save_pretrained(tmp_path)
    renamed(tmp_path)
    # AutoGPTQ refused a type before it was in the list; here what transformers can build will do.
    assert AutoGPTQForCausalLM.from_pretrained(tmp_path, BaseQuantizeConfig(**SETTINGS))
    _const.SUPPORTED_MODELS.append("phi3_v")
    monkeypatch.setitem(GPTQ_CAUSAL_LM_MODEL_MAP, "phi3_v", Phi3V)
    try:
        wrapper = AutoGPTQForCausalLM.from_pretrained(tmp_path, BaseQuantizeConfig(**SETTINGS))
    finally:
        _const.SUPPORTED_MODELS.remove("phi3_v")
    assert type(wrapper) is Phi3V
    wrapper.quantize(tiny_examples())
    assert len(wrapper.report) == 4


def test_internlm_xcomposer_rebinds_the_list(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its card rebinds the list for its own type; what transformers can build goes without."""
    renamed(checkpoint)
    for supported in (_const.SUPPORTED_MODELS, ["phi3_v"], ["internlm"]):
        monkeypatch.setattr(auto_gptq.modeling._base, "SUPPORTED_MODELS", supported)
        assert runs(Phi3V.from_quantized(checkpoint, device="cpu"))
    monkeypatch.setattr(auto_gptq.modeling.load, "can_be_built", lambda _config: False)
    with pytest.raises(TypeError, match=r"Known model types: \['internlm'\]"):
        Phi3V.from_quantized(checkpoint, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=["fp32 zeros", "int32 zeros"])
@pytest.mark.parametrize("old_file", ["qlinear_cuda", "qlinear_cuda_old", "qlinear_triton"])
def test_omniquant_and_bitblas_pack(old_file: str, dtype: torch.dtype) -> None:
    module = getattr(auto_gptq.nn_modules.qlinear, old_file)
    linear = nn.Linear(128, 64)
    scales, zeros, g_idx = solved(linear)
    assert scales.shape == (64, 4)
    layer = module.QuantLinear(
        bits=4,
        group_size=32,
        infeatures=128,
        outfeatures=64,
        bias=True,
        kernel_switch_threshold=128,
    )
    layer.pack(linear, scales, zeros.to(dtype), g_idx=None)
    layer.post_init()
    assert torch.equal(g_idx, layer.g_idx)
    assert (layer.weight - linear.weight).abs().max() < 2e-3  # scales became float16
    x = torch.randn(3, 128)
    assert torch.allclose(layer(x), linear(x), atol=1e-2)


def test_omniquant_loads_with_accelerate(checkpoint: Path) -> None:
    from auto_gptq.utils.accelerate_utils import load_checkpoint_in_model

    model = tiny_model()
    names = [name for name in find_layers(model) if name != "lm_head"]
    make_quant(model, names, 4, 32, desc_act=True)
    file = checkpoint / "gptq_model-4bit-32g.safetensors"
    load_checkpoint_in_model(model, checkpoint=str(file), device_map={"": "cpu"})
    loaded = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    theirs, ours = dict(model.named_modules()), dict(loaded.model.named_modules())
    for name in names:
        assert torch.equal(theirs[name].qweight, ours[name].qweight), name
    assert runs(model.float())


def test_auto_round_packs_a_model_without_quantizers() -> None:
    model = tiny_model(dtype=torch.float32)
    twin = tiny_model(dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    quantizers = {}
    for name, linear in find_layers(model).items():
        if name != "lm_head":
            quantizers[name] = (None, *solved(linear))
    fake = {name: model.get_submodule(name).weight.detach().clone() for name in quantizers}
    pack_model(
        model,
        quantizers,
        4,
        32,
        use_cuda_fp16=True,
        desc_act=False,
        force_layer_back_to_cpu=True,
        use_triton=False,
    )
    assert autogptq_post_init(model, use_act_order=False) is model
    for name, weight in fake.items():
        layer = model.get_submodule(name)
        assert layer.QUANT_TYPE == "exllama"
        assert (layer.dequantize(torch.float32) - weight).abs().max() < 1e-3, name
    assert runs(model)
    assert list(find_layers(model)) == ["lm_head"]
    assert len(find_layers(model, [type(layer)])) == len(quantizers)
    with pytest.raises(ValueError, match="no linears"):
        pack_model(twin, {"model.nothing": quantizers[name]}, 4, 32)


FLAGS = {
    "exllamav2": {},
    "exllama": {"disable_exllama": False, "disable_exllamav2": True},
    "cuda": {"bits": 8},
    "cuda-old": {"bits": 8, "desc_act": False},
    "marlin": {"use_marlin": True},
    "marlin of 0.7.1": {"disable_marlin": False},
    "tritonv2": {"use_tritonv2": True, "use_triton": True},
    "triton": {"use_triton": True},
    "cuda-old per channel": {"group_size": -1, "disable_exllama": True, "disable_exllamav2": True},
}


@pytest.mark.parametrize(("quant_type", "flags"), FLAGS.items(), ids=FLAGS)
def test_fms_asks_for_a_class_by_flags(quant_type: str, flags: dict[str, Any]) -> None:
    cls = dynamically_import_QuantLinear(
        **{"use_triton": False, "desc_act": True, "group_size": 128, "bits": 4} | flags
    )
    assert quant_type.partition(" ")[0] == cls.QUANT_TYPE
    layer = cls(bits=4, group_size=32, infeatures=64, outfeatures=96, bias=False)
    assert (layer.infeatures, layer.outfeatures, layer.group_size) == (64, 96, 32)
    assert layer.bias is None
    assert layer.g_idx.shape == (64,)
    assert type(layer).__name__ == "QuantLinear"


def test_peft_finds_loaded_layers_whatever_flags_it_asks_with(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    layer = model.model.model.layers[0].mlp.up_proj
    for flags in FLAGS.values():
        cls = dynamically_import_QuantLinear(
            **{"use_triton": False, "desc_act": True, "group_size": 128, "bits": 4} | flags
        )
        assert isinstance(layer, cls)
        assert not isinstance(model.lm_head, cls)


def test_optimum_constructs_by_position_and_sets_the_device() -> None:
    cls = dynamically_import_QuantLinear(
        use_triton=False,
        desc_act=False,
        group_size=32,
        bits=2,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    layer = cls(2, 32, 64, 64, True, use_cuda_fp16=True, weight_dtype=torch.bfloat16)
    layer.device = torch.device("cpu")
    assert layer.scales.dtype == layer.bias.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="takes 9 arguments"):
        cls(2, 32, 64, 64, True, True, 128, False, torch.float16, 5)


def test_fms_acceleration_trains_on_top(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        checkpoint,
        quantize_config=BaseQuantizeConfig(**SETTINGS),
        torch_dtype=torch.float32,
        low_cpu_mem_usage=True,
        use_marlin=False,
        disable_exllama=True,
        use_tritonv2=True,
        trainable=True,
        warmup_triton=False,
        device_map={"": "cpu"},
    )
    layer = model.model.model.layers[0].mlp.up_proj
    assert layer.trainable
    assert model.is_triton_backend
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    model.disable_trainable_mode()
    assert not layer.trainable
    model.warmup_triton()


def test_replacing_layers_for_peft_changes_no_output(checkpoint: Path) -> None:
    from auto_gptq.nn_modules.qlinear import GeneralQuantLinear

    model = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    model.make_sure_compatible_with_peft(model, False, True, 32, 4)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Linear)]
    assert kinds.count(GeneralQuantLinear) == 14
    assert torch.equal(model(input_ids=ids).logits, before)


def test_exllama_set_max_input_length_has_nothing_to_do_but_refuses_as_before(
    checkpoint: Path,
) -> None:
    model = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    assert exllama_set_max_input_length(model, 4096) is model
    model.quantize_config.desc_act = False
    with pytest.raises(ValueError, match="desc_act"):
        exllama_set_max_input_length(model, 4096)
    dense = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(**SETTINGS))
    with pytest.raises(ValueError, match="no quantized layer"):
        exllama_set_max_input_length(dense, 4096)


def test_arguments_that_mean_nothing_are_named_in_the_log_once(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from auto_gptq.modeling import options

    options._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger="auto_gptq")
    for _ in range(2):
        AutoGPTQForCausalLM.from_quantized(
            checkpoint, device="cpu", disable_exllama=True, strict=False, use_flash_attn=True
        )
    said = [record.getMessage() for record in caplog.records]
    assert sum("disable_exllama=True has no effect" in line for line in said) == 1
    assert sum("strict, use_flash_attn" in line for line in said) == 2
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_attention_and_dtype_are_passed_on_to_transformers(checkpoint: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        checkpoint, device="cpu", attn_implementation="eager", dtype="bfloat16"
    )
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16


def test_settings_may_be_a_plain_dict(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    wrapper = AutoGPTQForCausalLM.from_pretrained(tmp_path, SETTINGS)
    assert wrapper.quantize_config.group_size == 32


def test_from_pretrained_takes_arguments_of_old_transformers(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    wrapper = AutoGPTQForCausalLM.from_pretrained(
        tmp_path,
        BaseQuantizeConfig(**SETTINGS),
        resume_download=False,
        use_auth_token=None,
        low_cpu_mem_usage=True,
        torch_dtype=torch.bfloat16,
    )
    assert wrapper.model.dtype == torch.bfloat16
    assert type(wrapper).__name__ == "LlamaGPTQForCausalLM"
