"""Experts in tiles: one product serves all, and each linear stays what it was for others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq.nn_modules.grouped import GroupedProduct
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import prepare
from auto_gptq.nn_modules.unfused import UnfusedExperts, find_unfused
from tests.nn_modules.test_experts import _logits, quantized


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the products; each entry is a number of experts."""
    made: list[int] = []
    call = GroupedProduct.__call__

    def counted(self: GroupedProduct, *args: Any) -> Tensor:
        made.append(len(self.tiles))
        return call(self, *args)

    monkeypatch.setattr(GroupedProduct, "__call__", counted)
    yield made


def laid_out(model_type: str, device: torch.device, **settings: Any) -> Any:
    model = quantized(model_type, **settings)
    model.to(device)
    if device.type == "cuda":
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    prepare(model)
    return model


def one_by_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(UnfusedExperts, "grouped", lambda _self: None)
        return _logits(model)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """x in 15 bits, or sums of 16-bit numbers in another order."""
    unit = 2e-3 if found.is_cuda else 2e-4
    assert torch.allclose(found, wanted, rtol=unit, atol=unit * float(wanted.abs().max()))


SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "3 bits": {"bits": 3},
    "act-order": {"desc_act": True},
    "asymmetric": {"sym": False},
    "groups of 16": {"group_size": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "jetmoe"])
def test_one_product_gives_what_single_linears_give(
    model_type: str,
    settings: dict[str, Any],
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    model = laid_out(model_type, device, **settings)
    wanted = one_by_one(model, monkeypatch)
    assert not calls
    found = _logits(model)
    if settings.get("group_size") == 16 and device.type == "cpu":  # no kernel of tiles there
        assert not calls
        return
    # Widths of 96 do not fill tiles: gate and up stay two products.
    assert len(calls) == {"mixtral": 3, "gpt_oss": 3, "jetmoe": 4}[model_type] * 2  # blocks
    assert set(calls) == {4}
    assert_close(found, wanted)


@torch.no_grad()
def test_the_checkpoint_is_the_same_and_copies_and_moves_stay_grouped(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    model = quantized("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(device)
    prepare(model)
    module: Any = next(iter(find_unfused(model).values()))
    assert module.explain().startswith("grouped")
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].cpu(), tensor), name
    copied = copy.deepcopy(model)
    for each in (copied, model.to("cpu").to(device)):
        own: Any = next(iter(find_unfused(each).values()))
        layer: Any = own.experts()[1].w2
        assert own._auto_gptq_grouped is None
        assert own.explain().startswith("grouped")
        # Nothing is in memory twice: the layer's tiles are its part of all experts'.
        (down,) = own._auto_gptq_grouped.products[("down",)]
        assert layer.tiles.data_ptr() == down.tiles[1].data_ptr()
        assert layer.tile_scales.data_ptr() == down.scales[1].data_ptr()
        for name, tensor in before.items():
            assert torch.equal(each.state_dict()[name].cpu(), tensor), name


@torch.no_grad()
def test_gate_and_up_are_one_product_where_they_fill_tiles(calls: list[int]) -> None:
    model = laid_out("mixtral", torch.device("cpu"))
    module: Any = next(iter(find_unfused(model).values()))
    for expert in module.experts():
        for name in ("w1", "w3"):
            setattr(expert, name, _random(64, 128))
        expert.w2 = _random(128, 64)
    assert [len(each) for each in module.grouped().products.values()] == [1, 1]
    x, chosen = torch.randn(3, 64), torch.tensor([[0, 2], [3, 1], [2, 0]])
    shares = torch.rand(3, 2)
    found = module(x, chosen, shares)
    assert calls == [4, 4]
    wanted = torch.zeros(3, 64)
    for t in range(3):
        for j in range(2):
            expert = module.experts()[int(chosen[t, j])]
            hidden = torch.nn.functional.silu(expert.w1(x[t])) * expert.w3(x[t])
            wanted[t] += shares[t, j] * expert.w2(hidden)
    assert_close(found, wanted)


def _random(k: int, n: int) -> QuantLinear:
    layer = QuantLinear(4, 32, k, n, bias=False)
    layer.qweight.random_()
    layer.scales.fill_(0.02)
    layer.prepare()
    return layer


@torch.no_grad()
def test_whoever_watches_or_changes_a_linear_is_served(calls: list[int]) -> None:
    """Hooks run and another module is called, and the module says why experts are apart."""
    model = laid_out("mixtral", torch.device("cpu"))
    module: Any = next(iter(find_unfused(model).values()))
    wanted = _logits(model)
    layer = module.experts()[2].w1
    seen: list[int] = []
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    assert_close(_logits(model), wanted)
    assert seen
    assert len(calls) == 3  # those of the other block
    assert module.explain() == (
        "one by one: w1 of expert 2 has hooks, which only a call of its own runs"
    )
    handle.remove()
    assert module.explain().startswith("grouped")

    module.experts()[2].w1 = torch.nn.Linear(64, 96, bias=False)
    assert module.explain() == "one by one: w1 of expert 2 is a Linear, not a QuantLinear"
    changed = _logits(model)
    assert not torch.allclose(changed, wanted, rtol=1e-3, atol=1e-3)
    module.experts()[2].w1 = layer

    layer.qweight = layer.qweight ^ 1  # other codes
    calls.clear()
    assert not torch.allclose(_logits(model), wanted, rtol=1e-5, atol=1e-6)
    layer.qweight = layer.qweight ^ 1
    layer.prepare()
    calls.clear()
    assert_close(_logits(model), wanted)
    assert len(calls) == 6
    module.experts()[0].w2.restore()
    assert module.explain() == "one by one: w2 of expert 0 is not laid out in tiles"
    assert_close(_logits(model), wanted)


def test_adapters_of_experts_learn(calls: list[int]) -> None:
    from peft import LoraConfig

    from auto_gptq import get_gptq_peft_model

    model = laid_out("mixtral", torch.device("cpu"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["w2"], init_lora_weights=False)
    plain = _logits(model)
    adapted = get_gptq_peft_model(model, config, train_mode=True)
    calls.clear()
    assert not torch.allclose(_logits(adapted), plain, rtol=1e-3, atol=1e-3)
    assert not calls
    ids = torch.arange(3, 51).view(2, 24)
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_A" in name]
    assert grads
    assert sum(float(grad.norm()) > 0 for grad in grads if grad is not None) > 4


def test_gradients_through_packed_experts_are_those_of_dense_ones() -> None:
    model = laid_out("mixtral", torch.device("cpu"))
    module: Any = next(iter(find_unfused(model).values()))
    x = torch.randn(5, 64, requires_grad=True)
    chosen = torch.tensor([[0, 2], [3, 1], [2, 0], [1, 2], [0, 1]])
    shares = torch.rand(5, 2, requires_grad=True)
    module(x, chosen, shares).square().sum().backward()
    found = x.grad, shares.grad
    dense_x, dense_shares = (t.detach().clone().requires_grad_() for t in (x, shares))
    total = torch.zeros(5, 64)
    for t in range(5):
        for j in range(2):
            expert = module.experts()[int(chosen[t, j])]
            w1, w2, w3 = (getattr(expert, n).dequantize(torch.float32) for n in ("w1", "w2", "w3"))
            hidden = torch.nn.functional.silu(dense_x[t] @ w1.t()) * (dense_x[t] @ w3.t())
            row = torch.zeros(5, 64)
            row[t] = 1
            total = total + row * (dense_shares[t, j] * (hidden @ w2.t()))
    total.square().sum().backward()
    for mine, wanted in zip(found, (dense_x.grad, dense_shares.grad), strict=True):
        assert mine is not None
        assert wanted is not None
        assert_close(mine, wanted)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_torch_compile_takes_a_mixture_whole(model_type: str, device: torch.device) -> None:
    model = laid_out(model_type, device)
    with torch.inference_mode():
        wanted = _logits(model)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(_logits_of(compiled, device), wanted)


@torch.inference_mode()
def test_compiled_experts_notice_another_linear() -> None:
    module: Any = next(iter(find_unfused(laid_out("mixtral", torch.device("cpu"))).values()))
    x, chosen, shares = torch.randn(3, 64), torch.tensor([[0, 2], [3, 1], [2, 0]]), torch.rand(3, 2)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager")
    before = compiled(x, chosen, shares)
    assert_close(before, module(x, chosen, shares))
    module.experts()[2].w1 = torch.nn.Linear(64, 96, bias=False)
    wanted = module(x, chosen, shares)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)
    assert_close(compiled(x, chosen, shares), wanted)


def _logits_of(forward: Any, device: torch.device) -> Tensor:
    ids = torch.arange(3, 51, device=device).view(2, 24)
    return forward(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
