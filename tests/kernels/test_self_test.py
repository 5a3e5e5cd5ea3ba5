"""A kernel that is wrong on a device is found out before it is used."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from auto_gptq.formats.gptq import trivial_g_idx
from auto_gptq.kernels import choose, native, self_test
from auto_gptq.nn_modules.grouped import Place, group
from auto_gptq.nn_modules.qlinear import QuantLinear


class Wrong(TorchDispatchMode):
    """Run every operator but one, which gives something else."""

    def __init__(self, name: str, change: Any) -> None:
        super().__init__()
        self.name, self.change = name, change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.change(result) if str(func) == f"auto_gptq.{self.name}.default" else result


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    if not native.load():
        pytest.skip(native.reason())
    for cached in (self_test.failure, self_test.failure_of_experts, choose._warn_once):
        cached.cache_clear()
    yield
    for cached in (self_test.failure, self_test.failure_of_experts, choose._warn_once):
        cached.cache_clear()


def fail(_: Any) -> Any:
    raise RuntimeError("no kernel image is available")


WRONG = {
    "a tenth too large": ("q_matmul", lambda y: y * 1.1, "multiplies 1 rows"),
    "two outputs swapped": ("q_matmul", lambda y: y.roll(1, -1), "multiplies 1 rows"),
    "many rows only": ("q_matmul", lambda y: y * (1 + (y.shape[0] > 100)), "200 rows"),
    "not a number": ("q_matmul", lambda y: y * float("nan"), "relative error of nan"),
    "misplaced": ("repack_tiles", lambda t: t.roll(1, -1), "repack_tiles misplaces codes"),
    "another weight": ("dequantize_tiles", lambda w: w + 1, "gives another weight"),
    "an error": ("q_matmul", fail, "stops with no kernel image"),
}


@pytest.mark.parametrize("name, change, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_is_found_and_replaced(
    name: str, change: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING), Wrong(name, change):
        kernel = choose.choose(choose.Weight(device, 4, 64))
        choose.choose(choose.Weight(device, 4, 128))
    assert kernel.name == "cpu-fp32"
    assert message in caplog.text
    assert len(caplog.records) == 1, "it is said once"
    explained = choose.explain(choose.Weight(device, 4, 64))
    assert "cpu: its self-test fails: with 4 bits on cpu" in explained
    assert choose.choose(choose.Weight(device, 8, 64)).name == "cpu", "others are not touched"


def test_a_layer_works_on_where_a_kernel_is_wrong() -> None:
    layer = QuantLinear(4, 64, 128, 64, bias=False)
    layer.pack_codes(
        torch.randint(0, 16, (64, 128)),
        torch.rand(64, 2),
        torch.randint(0, 16, (64, 2)),
        trivial_g_idx(128, 64),
    )
    x = torch.randn(3, 128)
    expected = x @ layer.dequantize(torch.float32).t()
    with Wrong("q_matmul", lambda y: y * 1.1):
        layer.prepare()
        assert not layer.is_prepared
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_kernels_here_pass_quickly(bits: int, device: torch.device) -> None:
    self_test.failure(device, bits)
    self_test.failure.cache_clear()
    started = time.perf_counter()
    assert self_test.failure(device, bits) is None
    assert time.perf_counter() - started < 0.5  # some 10 ms; this machine may be busy


def test_plain_torch_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "there is no library")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            chosen = choose.choose(choose.Weight(torch.device("cpu"), 4, 64))
    assert chosen.name == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cpu: there is no library" in caplog.text


def test_wrong_products_of_experts_are_not_used(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    layer = QuantLinear(4, 32, 64, 64, bias=False).to(device)
    layer.prepare()
    device = layer.qweight.device  # with its number, as everything on a GPU has it
    for bits in (2, 3, 4, 8):
        assert self_test.failure_of_experts(device, bits) is None
    self_test.failure_of_experts.cache_clear()
    with caplog.at_level(logging.WARNING), Wrong("q_experts", lambda y: y.roll(1, -1)):
        why = self_test.failure_of_experts(device, 4)
    assert why is not None
    assert "multiply (1, 0, 2) rows of" in why
    assert "called one by one" in caplog.text
    expert = torch.nn.Module()
    expert.down = layer
    found = group({("down",): [[Place(0, expert, "down")]]})
    assert found == f"the self-test fails: {why}"
