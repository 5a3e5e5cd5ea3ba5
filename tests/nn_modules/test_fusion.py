"""Projections of one input as one matrix: the same numbers, and every module is what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from auto_gptq.kernels import choose
from auto_gptq.nn_modules.fusion import find_obstacle, product
from auto_gptq.nn_modules.qlinear import QuantLinear

TILES = choose.Kernel("tiles", "tiles", None)


@pytest.fixture(autouse=True)
def _tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay weights out in tiles also where no fast kernel reads them."""
    monkeypatch.setattr(choose, "KERNELS", (TILES, *choose.KERNELS))


def layer(
    out_features: int = 64,
    bits: int = 4,
    *,
    group_size: int = 32,
    sym: bool = True,
    bias: bool = False,
    order: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    in_features: int = 128,
) -> QuantLinear:
    """A prepared layer of random integers."""
    made = QuantLinear(
        bits, group_size, in_features, out_features, bias, weight_dtype=dtype,
        checkpoint_format="gptq_v2",
    )  # fmt: skip
    groups = in_features // group_size
    g_idx = torch.arange(in_features) // group_size
    zeros = torch.randint(0, 1 << bits, (out_features, groups))
    made.pack_codes(
        torch.randint(0, 1 << bits, (out_features, in_features)),
        torch.rand(out_features, groups) * 0.1 + 0.01,
        torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros,
        g_idx if order is None else g_idx[order],
        torch.randn(out_features) if bias else None,
    )
    made.prepare()
    assert made.is_prepared
    return made


ORDER = torch.randperm(128, generator=torch.Generator().manual_seed(0))
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "q, k, v": [{"out_features": 128}, {}, {}],
    "a ragged last one": [{}, {"out_features": 96}],
    "biases": [{"bias": True}, {}, {"bias": True}],
    "zero points of some": [{}, {"sym": False}],
    "act-order": [{"order": ORDER}, {"order": ORDER, "out_features": 128}],
    **{f"{bits} bits": [{"bits": bits}, {"bits": bits, "sym": False}] for bits in (2, 3, 8)},
}


@pytest.mark.parametrize("settings", TOGETHER.values(), ids=TOGETHER)
def test_one_matrix_computes_what_its_parts_do(settings: list[dict[str, Any]]) -> None:
    layers = [layer(**each) for each in settings]
    states = [copy.deepcopy(each.state_dict()) for each in layers]
    x = torch.randn(5, 128)
    wanted = torch.cat([each(x) for each in layers], -1)

    fused = product(layers)
    assert fused.settings[-1] == wanted.shape[1]  # type: ignore[attr-defined]
    assert torch.allclose(fused(x), wanted, rtol=1e-6, atol=1e-6)
    base = {each._buffers["tiles"].untyped_storage().data_ptr() for each in layers}
    assert len(base) == 1, "the parts must not be a second copy"
    for each, before in zip(layers, states, strict=True):
        after = each.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.cat([each(x) for each in layers], -1), wanted)


def test_a_part_can_be_taken_out_again() -> None:
    layers = [layer(), layer()]
    weight = layers[0].dequantize(torch.float32)
    fused = product(layers)
    x = torch.randn(1, 128)
    wanted = fused(x)
    layers[0].restore()
    assert not layers[0].is_prepared
    assert torch.equal(layers[0].dequantize(torch.float32), weight)
    assert torch.equal(fused(x), wanted)


def test_parts_still_pass_gradients_on() -> None:
    layers = [layer(), layer()]
    with torch.inference_mode():
        product(layers)
    x = torch.randn(2, 128, requires_grad=True)
    layers[1](x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


APART: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "bits": ("bits is 8 beside 4", [{}, {"bits": 8}]),
    "groups": ("group_size is 64 beside 32", [{}, {"group_size": 64}]),
    "inputs": ("in_features is 64 beside 128", [{}, {"in_features": 64}]),
    "orders": ("different orders", [{"order": ORDER}, {"order": ORDER.flip(0)}]),
    "one order": ("different orders", [{"order": ORDER}, {}]),
    "ragged": ("do not fill whole tiles", [{"out_features": 96}, {}]),
    "scales": ("scales are torch.float32", [{}, {"dtype": torch.float32}]),
}


@pytest.mark.parametrize(("reason", "settings"), APART.values(), ids=APART)
def test_what_does_not_fit_together_is_multiplied_apart(
    reason: str, settings: list[dict[str, Any]]
) -> None:
    layers = [layer(**each) for each in settings]
    assert reason in str(find_obstacle(layers))
    if len({each.in_features for each in layers}) == 1:
        x = torch.randn(3, 128)
        assert torch.equal(product(layers)(x), torch.cat([each(x) for each in layers], -1))
