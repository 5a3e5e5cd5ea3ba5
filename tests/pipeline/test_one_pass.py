"""One pass per block gives what running the block anew for every step gives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.examples import make_batches, merge_batches
from auto_gptq.errors import NumericsError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear.linear import dense_weight
from auto_gptq.pipeline import block, one_pass
from auto_gptq.pipeline import quantize as pipeline
from auto_gptq.pipeline.block import Solved, solve_together
from auto_gptq.quantization.hessian import Hessian
from tests.tiny import tiny_examples, tiny_model


def _passes() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("auto_gptq-pass")]


class _Followed:
    """Solve linears and note what the solver is given, or take what an earlier run has found.

    A second run then makes no choice of its own. Last bits decide some, and each moves all that
    come after: with a GPT-J's embeddings changed by 1e-7 of themselves, one and the same way gave
    15 % other codes in a matrix.
    """

    def __init__(self, model: nn.Module, earlier: _Followed | None = None) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.earlier = earlier
        self.given: dict[str, list[Tensor]] = {}
        self.found: dict[str, Solved] = {}

    def solve_together(
        self, linears: Mapping[str, nn.Linear], hessian: Hessian, *settings: Any
    ) -> Iterator[Solved]:
        for linear in linears.values():
            weight, mean = dense_weight(linear), hessian.mean()
            pull = [hessian.pull(weight), hessian.doubt(weight)] if hessian.is_compared else []
            unit = (weight.to(mean.dtype) @ mean).norm()
            self.given[self.names[linear]] = [mean / mean.norm(), *(x / unit for x in pull)]
        if self.earlier is None:
            solved = list(solve_together(linears, hessian, *settings))
        else:
            solved = [self.earlier.found[self.names[linear]] for linear in linears.values()]
        for each in solved:
            linear = linears[each.name]
            self.found[self.names[linear]] = each
            dense_weight(linear).copy_(each.solution.dequantize(linear.weight.dtype))
            yield each


@pytest.mark.parametrize("correction", [0.0, 0.5], ids=["plain", "corrected"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gptj", "phi", "opt", "gpt2"])
def test_both_ways_give_the_solver_the_same(
    model_type: str, correction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type)
    examples = tiny_examples(6, 40)
    examples[3] = {key: row[:25] for key, row in examples[3].items()}  # so that one batch is padded
    config = BaseQuantizeConfig(bits=4, group_size=32, static_groups=True, correction=correction)
    ways: list[_Followed] = []
    for fits in (True, False):
        monkeypatch.setattr(pipeline, "fits_one_pass", lambda *_, fits=fits: fits)
        wrapper = BaseGPTQForCausalLM(copy.deepcopy(model), False, config)
        ways.append(_Followed(wrapper.model, *ways))
        for module in (block, one_pass):
            monkeypatch.setattr(module, "solve_together", ways[-1].solve_together)
        wrapper.quantize(examples, batch_size=2)
    ours, theirs = (way.given for way in ways)
    assert ours.keys() == theirs.keys()
    for name in ours:
        for one, other in zip(ours[name], theirs[name], strict=True):
            # Where nothing is to be corrected yet, a pull is only last bits.
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-5, name
    assert not _passes()


def test_a_failure_in_the_midst_leaves_no_thread_behind() -> None:
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
    with pytest.raises(NumericsError, match="down_proj"):
        wrapper.quantize(tiny_examples(), batch_size=2)
    assert not _passes()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failure_inside_the_model_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def broken(*_args: object) -> torch.Tensor:
        raise LookupError("the model's own mistake")

    monkeypatch.setattr(model.model.layers[1].mlp.act_fn, "forward", broken)
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
    with pytest.raises(LookupError, match="the model's own mistake"):
        wrapper.quantize(tiny_examples(), batch_size=2)
    assert not _passes()


def test_batches_are_joined_only_where_nothing_is_padded() -> None:
    examples = tiny_examples(5, 16)
    examples[4] = {key: row[:9] for key, row in examples[4].items()}
    batches = make_batches(examples, batch_size=1)
    assert [b.input_ids.shape[0] for b in merge_batches(batches, 48)] == [3, 1, 1]
    padded = make_batches(examples, batch_size=2)  # the last one alone is of another length
    assert [b.input_ids.shape[0] for b in merge_batches(padded, 1000)] == [4, 1]
    joined = torch.cat([b.input_ids for b in merge_batches(batches[:4], 48)])
    assert torch.equal(joined, torch.cat([b.input_ids for b in batches[:4]]))
