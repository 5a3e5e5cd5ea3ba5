"""Tuning all scales together, for the logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.activations import Activations
from auto_gptq.calibration.examples import Batch
from auto_gptq.errors import ConfigError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize
from auto_gptq.pipeline import scales
from auto_gptq.pipeline.scales import _Scaled
from tests.tiny import tiny_model
from tests.zoo import tiny_of


def quantized(model: nn.Module, rows: Tensor, **settings: object) -> BaseGPTQForCausalLM:
    config = BaseQuantizeConfig.preset("default", 3, 32, **settings)
    wrapper = BaseGPTQForCausalLM(copy.deepcopy(model), False, config)
    wrapper.quantize(rows, batch_size=4)
    return wrapper


@torch.no_grad()
def divergence(model: nn.Module, wrapper: BaseGPTQForCausalLM, rows: Tensor) -> float:
    dequantize(wrapper.model, torch.float32)
    wanted, found = (m(rows).logits.log_softmax(-1) for m in (model, wrapper.model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_tuned_scales_bring_the_logits_of_new_rows_nearer(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales, "_TOKENS", 256)  # so that there are many steps
    monkeypatch.setattr(scales, "_RATE", 3e-3)
    mixture = model_type == "mixtral"
    model = tiny_of("mixtral") if mixture else tiny_model(model_type, torch.float32)
    model = model.float().eval()
    rows = torch.randint(2, 250, (80, 64))
    plain, tuned = (quantized(model, rows[:64], scale_epochs=n) for n in (0, 4))
    integers = [m.qweight for m in plain.modules() if isinstance(m, QuantLinear)]
    changed = [m for m in tuned.modules() if isinstance(m, QuantLinear)]
    for words, layer in zip(integers, changed, strict=True):
        assert torch.equal(words, layer.qweight)
        assert layer.scales.dtype == torch.float16
    before, after = (divergence(model, w, rows[64:]) for w in (plain, tuned))
    assert after < 0.98 * before
    assert all(parameter.requires_grad for parameter in tuned.model.parameters())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_what_is_tuned_begins_as_what_is_stored(bits: int, checkpoint_format: str) -> None:
    layer = QuantLinear(bits, 32, 96, 64, True, checkpoint_format=checkpoint_format)
    layer.pack_codes(
        torch.randint(0, 2**bits, (64, 96)),
        torch.randn(64, 3).half().float(),
        torch.randint(1, 2**bits, (64, 3)),
        torch.arange(96) % 3,
        torch.randn(64),
    )
    x = torch.randn(5, 96)
    found = _Scaled(layer)(x)
    wanted = x @ layer.dequantize(torch.float32).t() + layer.bias.float()
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_scales_that_tuning_makes_worse_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_RATE", 1.0)
    model, rows = tiny_model(dtype=torch.float32), torch.randint(2, 250, (8, 64))
    plain, spoilt = (quantized(model, rows, scale_epochs=n).model.state_dict() for n in (0, 1))
    for name, tensor in plain.items():
        assert torch.equal(tensor, spoilt[name]), name


@pytest.mark.parametrize(("rows", "steps", "of_a_step"), [(4, 4, 1), (16, 16, 1), (64, 16, 4)])
def test_few_rows_are_parted_into_more_steps(rows: int, steps: int, of_a_step: int) -> None:
    """16 rows of 512 tokens once were two steps, of which none could be held out."""
    ids, hidden = torch.zeros(rows, 64, dtype=torch.long), torch.zeros(rows, 64, 8)
    exact = Activations(torch.device("cpu"), torch.float32, hidden.numel())
    exact.append(hidden)
    found = list(scales._steps([Batch(ids, torch.ones_like(ids))], exact))
    assert len(found) == steps
    assert all(hidden.shape == (of_a_step, 64, 8) for _, hidden in found)


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_RATE", 3e-3)
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(2, 250, (8, 64))
    padded = [
        {
            "input_ids": torch.cat([torch.full((16,), junk), row]),
            "attention_mask": torch.cat([torch.zeros(16), torch.ones(64)]).long(),
        }
        for junk, row in zip([3, 5] * 4, rows, strict=True)
    ]
    other = [example | {"input_ids": example["input_ids"].clone()} for example in padded]
    for example in other:
        example["input_ids"][:16] = 7
    one, another = (
        quantized(model, given, scale_epochs=2).model.state_dict() for given in (padded, other)
    )
    for name in (name for name in one if name.endswith("scales")):
        assert torch.allclose(one[name].float(), another[name].float(), rtol=2e-3), name


def test_activations_that_memory_does_not_hold_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again: list[int] = []
    checkpointed = scales._checkpointed

    def counting(index: int, forward: object) -> object:
        again.append(index)
        return checkpointed(index, forward)

    monkeypatch.setattr(scales, "_checkpointed", counting)
    model, rows = tiny_model(dtype=torch.float32), torch.randint(2, 250, (8, 64))
    kept = quantized(model, rows, scale_epochs=2).model.state_dict()
    assert again == [0]  # once, to see what the last of two blocks keeps
    monkeypatch.setattr(scales, "_FOR_ACTIVATIONS", 0)
    spared = quantized(model, rows, scale_epochs=2).model.state_dict()
    assert len(again) > 30
    for name in (name for name in kept if name.endswith("scales")):
        assert torch.allclose(kept[name].float(), spared[name].float(), rtol=2e-3), name


def test_a_negative_number_of_epochs_is_refused() -> None:
    with pytest.raises(ConfigError, match="scale_epochs"):
        BaseQuantizeConfig(scale_epochs=-1)
