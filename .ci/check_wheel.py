"""What must hold where the wheel was installed; .ci/run build runs it there, without a compiler.

It imports nothing of this repository but the installed package.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import auto_gptq
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.kernels import choose, native
from auto_gptq.nn_modules.qlinear import QuantLinear


def test_the_installed_package_is_tested_where_nothing_can_be_compiled() -> None:
    assert Path(auto_gptq.__file__).is_relative_to(sys.prefix)
    for compiler in ("cc", "gcc", "c++", "g++", "clang", "nvcc", "ninja"):
        assert shutil.which(compiler) is None, compiler


def test_the_native_library_is_there() -> None:
    assert native.load(), native.reason()
    weight = choose.Weight(torch.device("cpu"), 4, 128)
    assert choose.explain(weight).splitlines()[-1] == "cpu: runs"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_multiply(bits: int) -> None:
    layer = QuantLinear(bits, 32, 96, 64, bias=True)
    codes, zeros = torch.randint(0, 1 << bits, (64, 96)), torch.randint(0, 1 << bits, (64, 3))
    scales = torch.rand(64, 3) * 0.1
    layer.pack_codes(codes, scales, zeros, torch.arange(96) // 32, torch.rand(64))
    group = torch.arange(96) // 32
    weight = (codes - zeros[:, group]) * scales.half().float()[:, group]
    for rows in (1, 40):
        x = torch.randn(rows, 96)
        expected = x @ weight.t() + layer.bias.float()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        layer.prepare()
        assert layer.is_prepared
        # In 15 bits; an output that cancels out is no smaller in its error than the others.
        assert (layer(x) - expected).norm() < 2e-4 * expected.norm()
        layer.restore()


def test_a_model_is_quantized_saved_loaded_and_writes(tmp_path: Path) -> None:
    settings = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**settings, **heads)).save_pretrained(tmp_path)
    config = BaseQuantizeConfig(bits=4, group_size=32)
    model = AutoGPTQForCausalLM.from_pretrained(tmp_path, config)
    model.quantize(torch.randint(0, 100, (4, 40)))
    model.save_quantized(tmp_path / "4bit")
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path / "4bit", device="cpu")
    tokens = loaded.generate(input_ids=torch.randint(0, 100, (1, 5)), max_new_tokens=5)
    assert tokens.shape == (1, 10)
