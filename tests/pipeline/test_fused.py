"""Norms and rotations in one kernel each."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq.calibration.capture import capture
from auto_gptq.calibration.examples import make_batches
from auto_gptq.pipeline.fused import fused, fused_norms, fused_rotations
from tests.tiny import tiny_examples, tiny_model

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


def test_norms_are_put_back_after_an_error() -> None:
    block = first_block("llama", torch.float16)
    with pytest.raises(KeyError), fused_norms(block):
        assert replaced(block)
        raise KeyError
    assert replaced(block) == []


# cohere's turn neighbours, and phi's only some channels, which its code parts itself.
ROTATED = {"llama": True, "gemma": True, "phi": True, "cohere": False, "gptj": False, "opt": False}


@torch.no_grad()
@pytest.mark.parametrize("model_type", ROTATED)
def test_blocks_give_the_same_while_rotations_are_replaced(model_type: str) -> None:
    model = tiny_model(model_type, torch.bfloat16)
    blocks = model.transformer.h if model_type == "gptj" else model.get_decoder().layers
    captured = capture(model, list(blocks), make_batches(tiny_examples(4, 32), 2))
    hidden, call = captured.hidden[0], captured.calls[0][0]
    file = sys.modules[type(blocks[0]).__module__]
    own = getattr(file, "apply_rotary_pos_emb", None)
    before = blocks[0](hidden, *call.args, **call.kwargs)
    with fused(blocks[0]):
        assert (getattr(file, "apply_rotary_pos_emb", None) is not own) == ROTATED[model_type]
        after = blocks[0](hidden, *call.args, **call.kwargs)
    assert getattr(file, "apply_rotary_pos_emb", None) is own
    before, after = (x[0] if isinstance(x, tuple) else x for x in (before, after))
    assert float((after - before).norm()) < 0.01 * float((before - hidden).norm())


def test_other_rotations_are_left_to_the_models_function() -> None:
    """What the operator does not take, and what gradients pass through."""
    block = first_block("llama", torch.float16)
    file = sys.modules[type(block).__module__]
    q, k = torch.randn(2, 2, 4, 6, 32, dtype=torch.float16)
    cosine, sine = torch.randn(2, 1, 6, 32, dtype=torch.float16)
    flat = q.transpose(1, 2), k.transpose(1, 2), cosine, sine
    wanted = file.apply_rotary_pos_emb(q, k, cosine, sine)
    odd = file.apply_rotary_pos_emb(*flat, unsqueeze_dim=2)
    wide = file.apply_rotary_pos_emb(q, k, cosine.float(), sine.float())
    with fused_rotations(block):
        q.requires_grad_()
        file.apply_rotary_pos_emb(q, k, cosine, sine)[0].sum().backward()
        assert q.grad is not None and q.grad.abs().sum() > 0
        with torch.no_grad():
            found = file.apply_rotary_pos_emb(q, k, cosine, sine)
            assert all(torch.allclose(x, y, 0.01, 0.01) for x, y in zip(found, wanted, strict=True))
            assert torch.equal(file.apply_rotary_pos_emb(*flat, unsqueeze_dim=2)[0], odd[0])
            assert torch.equal(
                file.apply_rotary_pos_emb(q, k, cosine.float(), sine.float())[1], wide[1]
            )
