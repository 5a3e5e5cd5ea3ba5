"""Tuning whole blocks by gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.errors import ConfigError
from auto_gptq.formats.grid import GridRule
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import dequantize
from auto_gptq.pipeline import quantize as pipeline
from auto_gptq.pipeline import tuning
from auto_gptq.pipeline.block import Solved
from auto_gptq.quantization.solver import SolverOptions, solve
from tests.tiny import tiny_model


@torch.no_grad()
def logits_after(model: torch.nn.Module, config: BaseQuantizeConfig, rows: Tensor) -> Tensor:
    wrapper = BaseGPTQForCausalLM(copy.deepcopy(model), False, config)
    wrapper.quantize(rows, batch_size=4)
    dequantize(wrapper.model, torch.float32)
    found: Tensor = wrapper.model(rows).logits
    return found


@pytest.mark.parametrize(("model_type", "sym"), [("llama", True), ("gpt2", False)])
def test_a_tuned_model_is_nearer_to_the_full_precision_model(
    model_type: str, sym: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the rows that it was tuned on: a random model's are too few to say more."""
    monkeypatch.setitem(pipeline._TOKENS_AT_ONCE, "cpu", 512)  # so that there are many steps
    monkeypatch.setattr("auto_gptq.pipeline.tuning._CODE_RATE", 1e-3)
    monkeypatch.setattr(tuning, "held_out", lambda n: ([*range(n)], [*range(n)]))
    model = tiny_model(model_type, torch.float32)
    rows = torch.randint(2, 256, (64, 64))
    with torch.no_grad():
        wanted = model(rows).logits
    config = BaseQuantizeConfig.preset("default", 3, 32, sym=sym)
    tuned = BaseQuantizeConfig.preset("default", 3, 32, sym=sym, tuning_epochs=10)
    before, after = (logits_after(model, c, rows) for c in (config, tuned))
    assert (after - wanted).norm() < 0.99 * (before - wanted).norm()


def test_what_is_tuned_is_what_is_stored() -> None:
    """The block goes on with the weights that the packed integers stand for."""
    model = tiny_model(dtype=torch.float16)
    wrapper = BaseGPTQForCausalLM(
        model, False, BaseQuantizeConfig.preset("default", 4, 32, tuning_epochs=3)
    )
    wrapper.quantize(torch.randint(2, 256, (16, 64)), batch_size=4)
    layers = [m for m in wrapper.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14
    for layer in layers:
        assert torch.isfinite(layer.scales).all()
        assert layer.scales.dtype == torch.float16
        assert torch.equal(layer.g_idx, torch.arange(layer.in_features).int() // 32)


def test_integers_that_tuning_makes_worse_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auto_gptq.pipeline.tuning._CODE_RATE", 3.0)
    model, rows = tiny_model(dtype=torch.float32), torch.randint(2, 256, (8, 64))
    plain, spoilt = (
        logits_after(model, BaseQuantizeConfig.preset("default", 4, 32, tuning_epochs=n), rows)
        for n in (0, 1)
    )
    assert torch.allclose(plain, spoilt, atol=1e-5)


def test_a_negative_number_of_epochs_is_refused() -> None:
    with pytest.raises(ConfigError, match="tuning_epochs"):
        BaseQuantizeConfig(tuning_epochs=-1)


def test_integers_are_judged_by_tokens_that_they_were_not_tuned_on() -> None:
    """With 8 batches or more one is held out; tuning that only learns the others by heart loses."""
    model, rows = tiny_model(dtype=torch.float32), torch.randint(2, 256, (64, 16))
    wrapper = BaseGPTQForCausalLM(
        model, False, BaseQuantizeConfig.preset("default", 3, 32, tuning_epochs=3)
    )
    seen: list[list[int]] = []
    mean = tuning._Fp32Run.mean

    def noting(self: object, weights: object, batches: list[int]) -> float:
        seen.append(list(batches))
        return mean(self, weights, batches)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline._TOKENS_AT_ONCE, "cpu", 64)  # 16 batches
        patch.setattr(tuning._Fp32Run, "mean", noting)
        wrapper.quantize(rows, batch_size=4)
    assert seen == [[7, 15]] * 4  # two blocks, before and after


@pytest.mark.parametrize("batches", range(2, 40))
def test_some_batches_are_held_out_however_few_there_are(batches: int) -> None:
    learnt, judged = tuning.held_out(batches)
    assert sorted(learnt + judged) == list(range(batches))
    assert judged
    assert len(judged) <= max(1, batches / 8)


@pytest.mark.parametrize("static_groups", [True, False])
def test_scales_reach_the_inputs_of_their_groups(static_groups: bool) -> None:
    rule = GridRule(4)
    options = SolverOptions(
        rule, 32, act_order=True, static_groups=static_groups, keep_unrounded=True
    )
    x = torch.randn(512, 80) * torch.linspace(2, 0.1, 80)[torch.randperm(80)]
    solution = solve(torch.randn(16, 80), x.t() @ x / 512, options)
    assert solution.unrounded is not None
    tuned = tuning._Tuned.start(Solved("a", solution, 0.0, 512, 0.0), solution.unrounded, 4)
    assert tuned.together == (32 if static_groups else 0)
    assert torch.equal(tuned.weight(), solution.dequantize())
