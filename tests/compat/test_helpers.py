"""AutoGPTQ's helper functions, the settings of 0.7.1, and classes that are only names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import _base, _utils
from auto_gptq.modeling._base import BaseGPTQForCausalLM
from auto_gptq.nn_modules import _fused_base, fused_llama_attn
from auto_gptq.nn_modules.qlinear import QuantLinear, qlinear_hpu, qlinear_qigen
from auto_gptq.nn_modules.triton_utils.dequant import QuantLinearFunction, dequant248
from auto_gptq.nn_modules.triton_utils.kernels import transpose_quant_matmul_248
from auto_gptq.utils import import_utils, marlin_utils, modeling_utils
from tests.tiny import tiny_examples, tiny_model


def test_settings_of_0_7_1_are_understood() -> None:
    marlin = BaseQuantizeConfig(desc_act=False, is_marlin_format=True)
    assert (marlin.quant_method, marlin.checkpoint_format) == ("gptq", "marlin")
    awq = BaseQuantizeConfig(desc_act=False, awq_gemm_checkpoint=True)
    assert (awq.quant_method, awq.checkpoint_format) == ("awq", "gemm")
    assert "is_marlin_format" not in marlin.to_dict()
    assert replace(marlin, bits=4) == marlin
    read = BaseQuantizeConfig.from_quant_config({"bits": 4, "sym": True, "is_marlin_format": True})
    assert read.checkpoint_format == "marlin"
    read = BaseQuantizeConfig.from_quant_config({"sym": True, "is_marlin_format": False})
    assert read.checkpoint_format == "gptq"


def test_modules_are_found_by_name_and_by_type() -> None:
    model = tiny_model()
    found = _utils.find_layers(model.model.layers[0], name="block")
    assert "block.self_attn.q_proj" in found
    assert len(found) == 7
    assert _utils.get_module_by_name_prefix(model, "model.layers.1") is model.model.layers[1]
    assert _utils.get_module_by_name_suffix(model, "q_proj") is found["block.self_attn.q_proj"]
    assert _utils.get_module_by_name_suffix(model, "nothing") is None
    conv = _utils.find_layers(tiny_model("gpt2").transformer.h[0])
    assert set(conv) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert _utils.find_layers(nn.Linear(2, 2)).keys() == {""}


def test_devices_and_nested_values() -> None:
    cpu = torch.device("cpu")
    assert _utils.get_device(torch.zeros(1)) == cpu
    assert _utils.get_device(QuantLinear(4, 32, 64, 32, bias=False)) == cpu
    assert _utils.move_to_device(None, cpu) is None
    moved = _base.nested_move_to_device((torch.zeros(1), [torch.ones(1)], "x"), "meta")
    assert moved[0].is_meta
    assert moved[1][0].is_meta
    assert moved[2] == "x"


def test_dotted_names_are_read_and_set() -> None:
    model = tiny_model()
    assert modeling_utils.recurse_getattr(model, "model.layers.0.mlp.up_proj").in_features == 64
    modeling_utils.recurse_setattr(model, "model.layers.0.mlp.up_proj", nn.Identity())
    modeling_utils.recurse_setattr(model, "mark", 5)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Identity)
    assert model.mark == 5


def test_versions_are_compared() -> None:
    assert import_utils.compare_pytorch_version("v2.0.0", op="gt")
    assert not import_utils.compare_transformers_version("v4.28.0", op="le")
    with pytest.raises(AssertionError, match="ne"):
        import_utils.compare_pytorch_version("v2.0.0", op="ne")


def test_marlin_says_what_it_cannot_hold() -> None:
    fits = BaseQuantizeConfig(group_size=128, desc_act=False)
    assert marlin_utils._validate_marlin_compatibility(fits) is None
    for change in ({"bits": 8}, {"group_size": 64}, {"sym": False}, {"desc_act": True}):
        (name,) = change
        assert name in marlin_utils._validate_marlin_compatibility(replace(fits, **change))


def test_a_checkpoint_is_found_and_its_type_read(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(group_size=32)
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, config)
    wrapper.quantize(tiny_examples(2))
    wrapper.save_quantized(tmp_path)
    assert _utils.check_and_get_model_type(tmp_path) == "llama"
    is_sharded, file, base = _utils.get_checkpoints(
        tmp_path, [".safetensors"], ["gptq_model-4bit-32g"]
    )
    assert (is_sharded, base) == (False, "gptq_model-4bit-32g")
    assert Path(file).is_file()
    with pytest.raises(FileNotFoundError, match=r"other\.bin"):
        _utils.get_checkpoints(tmp_path, [".bin"], ["other"])
    model = _utils.simple_dispatch_model(wrapper.model, {"": "cpu"})
    assert model.hf_device_map == {"": "cpu"}


def test_a_bias_on_the_meta_device_becomes_zeros() -> None:
    model = nn.Sequential(QuantLinear(4, 32, 64, 32, bias=True))
    model[0].register_buffer("bias", model[0].bias.to("meta"))
    _base.make_sure_no_tensor_in_meta_device(model, False, True, 32, 4, True, True)
    assert torch.equal(model[0].bias, torch.zeros(32, dtype=torch.float16))


def test_the_triton_functions_compute_with_packed_weights() -> None:
    layer = QuantLinear(4, 32, 64, 96, bias=False, weight_dtype=torch.float32)
    layer.qweight = torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape, dtype=torch.int32)
    layer.scales.fill_(0.01)
    packed = layer.qweight, layer.scales, layer.qzeros, layer.g_idx
    weight = dequant248(*packed, 4)
    assert torch.equal(weight, layer.weight.t())
    x = torch.randn(3, 64, requires_grad=True)
    y = QuantLinearFunction.apply(x, *packed, 4, 15)
    assert torch.allclose(y, x @ weight, atol=1e-4)
    y.sum().backward()
    assert torch.allclose(x.grad, weight.sum(1).expand(3, -1), atol=1e-4)
    back = transpose_quant_matmul_248(y.detach(), *packed, 4, 15)
    assert torch.allclose(back, y @ weight.t(), atol=1e-4)


@pytest.mark.parametrize(
    "cls",
    [
        qlinear_hpu.QuantLinear,
        qlinear_qigen.QuantLinear,
        _fused_base.FusedBaseMLPModule,
        fused_llama_attn.FusedLlamaAttentionForQuantizedModel,
    ],
    ids=lambda cls: cls.__name__,
)
def test_what_is_gone_says_what_to_use(cls: type) -> None:
    with pytest.raises(NotImplementedError, match="cannot be built any more") as caught:
        cls(4, 32, 64, 64, False)
    assert any(word in str(caught.value) for word in ("use ", "leave it out"))
