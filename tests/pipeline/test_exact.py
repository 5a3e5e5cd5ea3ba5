"""Running beside the full-precision model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.architectures import find
from auto_gptq.calibration.capture import BlockCall, capture
from auto_gptq.calibration.examples import make_batches
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.experts import unfuse
from auto_gptq.nn_modules.qlinear.linear import dense_weight
from auto_gptq.nn_modules.surgery import dequantize, features, find_linears
from auto_gptq.nn_modules.unfused import find_unfused
from auto_gptq.pipeline.exact import Exact, find_writers
from tests.tiny import tiny_examples, tiny_model
from tests.zoo import tiny_of

WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gptj": ["attn.out_proj", "mlp.fc_out"],  # side by side, both read the block's input
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gemma2": [],  # norms come in between
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
def test_original_weights_come_back_for_a_while_only() -> None:
    block, hidden, call = first_block(tiny_model(dtype=torch.float32))
    linears = find_linears(block)
    before = block(hidden, *call.args, **call.kwargs)
    exact = Exact(block, linears, ["self_attn.o_proj", "mlp.down_proj"])
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


@torch.no_grad()
def test_where_a_writer_shares_its_input_there_are_none() -> None:
    """Its outputs alone are compared, and those of the other linear would be left out."""

    class Twice(torch.nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            return x + self.one(x) + self.other(x if self.shared else x.clone())

    x = torch.randn(2, 8, 16)
    for shared, writers in ((False, ["one", "other"]), (True, [])):
        block = Twice(shared)
        assert find_writers(block, find_linears(block), x, BlockCall((), {})) == writers


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2's weights are transposed
def test_outputs_lack_the_full_precision_ones_and_what_the_stream_has_lost(model_type: str) -> None:
    block, hidden, _call = first_block(tiny_model(model_type, torch.float32))
    linears = find_linears(block)
    writer = WRITERS[model_type][1]
    exact = Exact(block, linears, WRITERS[model_type])
    width = features(linears[writer])[0]
    x, exact_x = torch.randn(2, *hidden.shape[:-1], width)
    residual, exact_residual = torch.randn(2, *hidden.shape)
    tokens = hidden.shape[:-1].numel()
    wanted, lack = exact.compare(writer, x, residual, exact_x, exact_residual, tokens)
    weight = dense_weight(linears[writer]).double()
    expected = (exact_x - x).double() @ weight.t() + (exact_residual - residual)
    assert wanted is None and lack is not None
    assert torch.allclose(lack.double(), expected, atol=1e-5)
    flat = x.view(-1, width), exact_x.view(-1, width)  # some models flatten batch and time
    _, lack = exact.compare(writer, flat[0], residual, flat[1], exact_residual, tokens)
    assert lack is not None and torch.allclose(lack.double(), expected.flatten(0, 1), atol=1e-5)
    reader = next(name for name in linears if name not in WRITERS[model_type])
    assert exact.compare(reader, x, None, exact_x, None, tokens) == (exact_x, None)
    assert exact.compare(writer, x, residual, None, None, tokens) == (None, None)


def test_experts_are_not_compared() -> None:
    """What they read in one model are other tokens than in the other."""
    model = tiny_of("mixtral")
    unfuse(model)
    block = model.model.layers[0]
    experts = next(iter(find_unfused(block)))
    exact, x = Exact(block, {}, []), torch.ones(8, 64)
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
