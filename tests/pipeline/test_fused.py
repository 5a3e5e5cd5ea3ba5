"""Norms in one kernel each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq.pipeline.fused import fused, fused_norms
from tests.tiny import tiny_model

# Model type → how many norms of a block are fused: gemma's multiply by 1 + weight, and opt's are
# no root-mean-square norms.
FUSED = {"llama": 2, "qwen3": 4, "phi3": 2, "gemma": 0, "opt": 0, "gpt2": 0}


def first_block(model_type: str, dtype: torch.dtype) -> Any:
    model = tiny_model(model_type, dtype)
    blocks = model.transformer.h if model_type == "gpt2" else model.get_decoder().layers
    for parameter in blocks[0].parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return blocks[0]


def replaced(block: Any) -> list[str]:
    return [name for name, module in block.named_modules() if "forward" in module.__dict__]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", FUSED)
def test_root_mean_square_norms_are_found_and_give_the_same(
    model_type: str, dtype: torch.dtype
) -> None:
    block = first_block(model_type, dtype)
    norms = {n: m for n, m in block.named_modules() if "norm" in n.rsplit(".")[-1]}
    inputs: dict[str, Tensor] = {}
    for name, norm in norms.items():
        width = norm.weight.numel() if norm.weight.dim() == 1 else 64
        inputs[name] = 30 * torch.randn(2, 5, width, dtype=dtype)
    before = {name: norm(inputs[name]) for name, norm in norms.items()}
    with fused_norms(block):
        names = replaced(block)
        after = {name: norm(inputs[name]) for name, norm in norms.items()}
    assert len(names) == FUSED[model_type]
    assert replaced(block) == []
    for name in norms:
        one_place = 2 * torch.finfo(dtype).eps
        assert torch.allclose(after[name], before[name], rtol=one_place, atol=1e-6)
        assert name in names or torch.equal(after[name], before[name])


@torch.no_grad()
def test_nothing_changes_in_fp32_or_for_inputs_of_another_dtype() -> None:
    with fused_norms(block := first_block("llama", torch.float32)):
        assert replaced(block) == []
    block = first_block("llama", torch.float16)
    x = torch.randn(3, 64)
    before = block.input_layernorm(x)
    with fused_norms(block):
        assert torch.equal(block.input_layernorm(x), before)


def test_all_is_put_back_after_an_error() -> None:
    block = first_block("llama", torch.float16)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(KeyError), fused(block):
        assert replaced(block)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert replaced(block) == []
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
