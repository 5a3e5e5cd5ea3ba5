"""Running beside the full-precision model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.architectures import find
from auto_gptq.calibration.capture import capture
from auto_gptq.calibration.examples import make_batches
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.experts import unfuse
from auto_gptq.nn_modules.surgery import dequantize, find_linears
from auto_gptq.nn_modules.unfused import find_unfused
from auto_gptq.pipeline.exact import Exact, Writer, find_writers
from tests.tiny import tiny_examples, tiny_model
from tests.zoo import tiny_of

WRITERS = {
    "llama": {"self_attn.o_proj": Writer(), "mlp.down_proj": Writer()},
    "opt": {"self_attn.out_proj": Writer(), "fc2": Writer()},
    # side by side, both read the block's input
    "gptj": {"attn.out_proj": Writer(), "mlp.fc_out": Writer()},
    "gpt2": {"attn.c_proj": Writer(), "mlp.c_proj": Writer()},
    "gemma2": {
        "self_attn.o_proj": Writer("post_attention_layernorm"),
        "mlp.down_proj": Writer("post_feedforward_layernorm"),
    },
}


def first_block(model: Any) -> tuple[Any, Tensor, Any]:
    blocks = model.get_submodule(find(model.config.model_type).blocks)
    captured = capture(model, list(blocks), make_batches(tiny_examples(2, 32), 2))
    return blocks[0], captured.hidden[0], captured.calls[0][0]


@pytest.mark.parametrize("model_type", WRITERS)
@torch.no_grad()
def test_the_linears_that_write_to_the_residual_stream_are_found(model_type: str) -> None:
    block, hidden, call = first_block(tiny_model(model_type, torch.float32))
    assert find_writers(block, find_linears(block), hidden, call) == WRITERS[model_type]


@torch.no_grad()
def test_a_factor_on_what_is_written_is_found() -> None:
    block, hidden, call = first_block(tiny_of("granite", residual_multiplier=0.22))
    writers = find_writers(block, find_linears(block), hidden, call)
    assert list(writers) == ["self_attn.o_proj", "mlp.down_proj"]
    for writer in writers.values():
        assert writer == Writer("", pytest.approx(0.22, rel=1e-4))


@pytest.mark.parametrize("model_type", ["granite", "gemma2", "olmo2"])
@torch.no_grad()
def test_what_is_put_out_besides_closes_the_gap(model_type: str) -> None:
    """Through a norm or a factor, and but for the norm's size, which follows its input."""
    extra = {"residual_multiplier": 0.22} if model_type == "granite" else {}
    block, hidden, call = first_block(tiny_of(model_type, **extra))
    writers = find_writers(block, find_linears(block), hidden, call)
    name, writer = next(iter(writers.items()))
    exact, linear = Exact(block, {}, writers), block.get_submodule(name)
    if writer.norm:  # as a trained one is
        norm = block.get_submodule(writer.norm)
        norm.weight.copy_(torch.rand(len(norm.weight)) + 0.5)
    x = torch.randn(*hidden.shape[:-1], linear.in_features)
    gap = 1e-3 * torch.randn_like(hidden)
    besides = exact.gap(name, x, hidden + gap, hidden)
    after = block.get_submodule(writer.norm) if writer.norm else torch.nn.Identity()
    closed = writer.factor * (after(linear(x) + besides) - after(linear(x)))
    assert (closed - gap).norm() < 0.2 * gap.norm()


@torch.no_grad()
def test_original_weights_come_back_for_a_while_only() -> None:
    block, hidden, call = first_block(tiny_model(dtype=torch.float32))
    linears = find_linears(block)
    before = block(hidden, *call.args, **call.kwargs)
    exact = Exact(block, linears, {"self_attn.o_proj": Writer(), "mlp.down_proj": Writer()})
    for linear in linears.values():
        linear.weight.mul_(0.9)
    after = block(hidden, *call.args, **call.kwargs)
    assert not torch.equal(after, before)
    seen: list[Tensor] = []
    with exact.in_place(), exact.watched(seen.append):
        assert torch.equal(block(hidden, *call.args, **call.kwargs), before)
    assert torch.allclose(hidden + seen[0] + seen[1], before, atol=1e-5)
    assert torch.equal(block(hidden, *call.args, **call.kwargs), after)
    assert len(seen) == 2


def test_experts_are_not_compared() -> None:
    """What they read in one model are other tokens than in the other."""
    model = tiny_of("mixtral")
    unfuse(model)
    block = model.model.layers[0]
    experts = next(iter(find_unfused(block)))
    exact, x = Exact(block, {}, {}), torch.ones(8, 64)
    assert exact.matching(f"{experts}.0.w1", x, x, 8) is None
    assert exact.matching("self_attn.o_proj", x, x, 8) is x
    assert exact.matching("self_attn.o_proj", x, x, 9) is None
    assert exact.matching("self_attn.o_proj", x[:7], x, 8) is None


@torch.no_grad()
def test_corrected_models_are_nearer_to_the_full_precision_model() -> None:
    model = tiny_model(dtype=torch.float32, num_hidden_layers=4, hidden_size=128)
    rows = torch.randint(2, 256, (72, 64))
    wanted = model(rows[64:]).logits
    missed = []
    for correction in (0.0, 0.75):
        config = BaseQuantizeConfig(3, 32, static_groups=True, correction=correction)
        wrapper = BaseGPTQForCausalLM(copy.deepcopy(model), False, config)
        wrapper.quantize(rows[:64], batch_size=4)
        dequantize(wrapper.model, torch.float32)
        missed.append(float((wrapper.model(rows[64:]).logits - wanted).norm()))
    assert missed[1] < 0.95 * missed[0]
