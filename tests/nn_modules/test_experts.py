"""Fused experts, parted: same outputs, names of checkpoints, enough tokens for everyone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules import unfused
from auto_gptq.nn_modules.experts import expert_groups, find_fused, unfuse
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import find_linears
from auto_gptq.nn_modules.unfused import calibrating, find_unfused, routed_tokens
from tests.tiny import tiny_examples
from tests.zoo import tiny_of

# One model type for each way of keeping experts, with the names of an expert's linears.
KINDS = {
    "mixtral": ["w1", "w3", "w2"],
    "qwen3_moe": ["gate_proj", "up_proj", "down_proj"],
    "aria_text": ["gate_proj", "up_proj", "down_proj"],  # transposed
    "gpt_oss": ["gate_proj", "up_proj", "down_proj"],  # transposed, interleaved, with biases
    "llama4_text": ["gate_proj", "up_proj", "down_proj"],  # batched
    "jetmoe": [],  # a list of linears
}


def quantized(model_type: str, **settings: Any) -> Any:
    settings = {"group_size": 32, "desc_act": False} | settings
    wrapper = BaseGPTQForCausalLM(tiny_of(model_type), False, BaseQuantizeConfig(**settings))
    wrapper.quantize(tiny_examples(2, 24))
    return wrapper.model


def _logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 51, device=next(model.parameters()).device).view(2, 24)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("model_type", "names"), KINDS.items(), ids=KINDS)
def test_parted_experts_compute_what_fused_ones_did(model_type: str, names: list[str]) -> None:
    model = tiny_of(model_type)
    fused = find_fused(model)
    before = _logits(model)
    assert unfuse(model) == list(fused)
    assert not find_fused(model)
    assert torch.allclose(_logits(model), before, rtol=1e-5, atol=1e-5)
    # What an expert reads in addition while calibrating changes nothing.
    for share in (0.0, 0.5, 1e9):
        with calibrating(model, share, batches=1):
            assert torch.allclose(_logits(model), before, rtol=1e-5, atol=1e-5)
            for module in find_unfused(model).values():
                assert sum(routed_tokens(module) or []) > 0
    for linears in expert_groups(model).values():
        assert [name.rsplit(".", 1)[1] for name in linears[: len(names)]] == names
        assert set(linears) <= set(find_linears(model))


def test_experts_are_parted_on_the_meta_device_and_survive_a_copy() -> None:
    model = tiny_of("mixtral")
    before = _logits(model)
    unfuse(model)
    assert torch.allclose(_logits(copy.deepcopy(model)), before, rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        skeleton = tiny_of("mixtral")
    unfuse(skeleton)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == shapes
    assert all(p.is_meta for p in skeleton.parameters())


def test_every_expert_reads_its_least_number_of_tokens() -> None:
    model = tiny_of("qwen3_moe")
    unfuse(model)
    module = next(iter(find_unfused(model).values()))
    with torch.no_grad():  # all tokens to experts 0 and 1
        router = next(m for m in model.modules() if type(m).__name__.endswith("Router"))
        router.weight.zero_()
    seen: dict[int, int] = {}
    for i, expert in enumerate(module.experts()):  # type: ignore[operator]
        expert.down_proj.register_forward_hook(
            lambda _m, args, _out, i=i: seen.__setitem__(i, len(args[0]))
        )
    with calibrating(model, 0.5, batches=1):
        _logits(model)
        routed = routed_tokens(module)
    assert routed is not None
    assert sorted(routed) == [0, 0, 48, 48]
    # Even routing would give each 48 * 2 / 4 = 24 tokens; half of that is 12.
    assert sorted(seen.values()) == [12, 12, 48, 48]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "jetmoe"])
def test_packed_experts_run_together_as_they_do_one_by_one(
    model_type: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """One call of the operator per projection, biases included, gives what single linears give."""
    model = quantized(model_type)
    model.to(device)
    for layer in model.modules():  # the checkpoint's layout
        if isinstance(layer, QuantLinear):
            layer.stays_prepared = False
            layer.restore()
    calls: list[int] = []
    packed = unfused.UnfusedExperts._project_packed_part

    def counted(self: unfused.UnfusedExperts, *args: object) -> torch.Tensor:
        calls.append(1)
        return packed(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(unfused.UnfusedExperts, "_project_packed_part", counted)
    together = _logits(model)
    projections = {"mixtral": 3, "gpt_oss": 3, "jetmoe": 4}[model_type]
    assert len(calls) == projections * 2  # blocks
    monkeypatch.setattr(unfused, "_can_group", lambda *_: False)
    assert torch.allclose(_logits(model), together, rtol=1e-4, atol=1e-5)
    assert len(calls) == projections * 2


def test_the_operator_leaves_rows_of_nobody_at_zero() -> None:
    layers = [QuantLinear(4, 32, 64, 32, bias=False) for _ in range(3)]
    for layer in layers:
        layer.qweight.random_()
        layer.scales.fill_(0.01)
    x, ends = torch.randn(9, 64), torch.tensor([4, 4, 7])  # expert 1 has no row, 7 and 8 no expert
    packed = [
        [getattr(m, name) for m in layers] for name in ("qweight", "qzeros", "scales", "g_idx")
    ]
    found = torch.ops.auto_gptq.q_linear_experts(x, ends, *packed, 4, 1)
    wanted = torch.cat([layers[0](x[:4]), layers[2](x[4:7]), torch.zeros(2, 32)])
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert_share", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("true_sequential", [True, False], ids=["in steps", "at once"])
@pytest.mark.parametrize(("model_type", "top_k"), [("qwen3_moe", 2), ("llama4_text", 1)])
def test_padding_says_nothing_to_experts(
    model_type: str, top_k: int, true_sequential: bool, expert_share: float
) -> None:
    """Experts see rows without their places in the batch, and once took padding for text."""

    def codes(filling: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, examples = tiny_of(model_type), tiny_examples(3, 40)
        for example in examples[:2]:  # the mask hides the end, whatever stands there
            example["attention_mask"][25:] = 0
            example["input_ids"][25:] = filling
        config = BaseQuantizeConfig(
            group_size=32, true_sequential=true_sequential, expert_share=expert_share
        )
        wrapper = BaseGPTQForCausalLM(model, False, config)
        wrapper.quantize(examples, batch_size=3)
        for block in (0, 1):  # each expert has three linears
            routed = [e.routed for e in wrapper.report if e.block == block and e.routed is not None]
            assert sum(routed) == 3 * (25 + 25 + 40) * top_k
        return {n: t for n, t in model.state_dict().items() if n.endswith("qweight")}

    first, second = codes(7), codes(99)
    assert any(".experts." in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
