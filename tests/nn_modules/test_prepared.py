"""A prepared layer computes in tiles, and shows the checkpoint's tensors to whoever asks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from auto_gptq.kernels import choose
from auto_gptq.nn_modules.qlinear import GeneralQuantLinear, QuantLinear

K, N = 128, 96


@pytest.fixture(autouse=True)
def _tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain torch over tiles come first, so that layers are prepared on any device."""
    row = choose.Kernel("torch over tiles", "tiles", None)
    monkeypatch.setattr(choose, "KERNELS", (row, *choose.KERNELS))


def make_layer(device: torch.device, *, act_order: bool = True, bits: int = 4) -> QuantLinear:
    layer = QuantLinear(bits, 32, K, N, bias=True)
    for name in ("qweight", "qzeros"):
        shape = getattr(layer, name).shape
        setattr(layer, name, torch.randint(-(2**31), 2**31, shape).to(torch.int32))
    layer.scales = torch.randn(layer.scales.shape).half() / 64
    if act_order:
        layer.g_idx = layer.g_idx[torch.randperm(K)]
    return layer.to(device)


def snapshot(layer: QuantLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same(layer: QuantLinear, expected: dict[str, Tensor]) -> None:
    state = layer.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        assert torch.equal(getattr(layer, name), tensor), name


@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_preparing_changes_nothing_that_can_be_seen(
    bits: int, act_order: bool, device: torch.device
) -> None:
    layer = make_layer(device, act_order=act_order, bits=bits)
    before, x = snapshot(layer), torch.randn(3, K, device=device)
    y, weight = layer(x), layer.dequantize(torch.float16)
    layer.prepare()
    assert layer.is_prepared
    assert_same(layer, before)
    assert torch.equal(layer.dequantize(torch.float16), weight)
    # A CPU's kernels over tiles take x in 15 bits.
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=2e-4 * float(y.abs().max()))
    layer.check("layer")
    layer.restore()
    assert not layer.is_prepared
    assert_same(layer, before)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_call_without_gradients_gives_an_ordinary_tensor(
    prepared: bool, device: torch.device
) -> None:
    layer = make_layer(device)
    if prepared:
        layer.prepare()
    x = torch.randn(3, K, device=device, requires_grad=True)
    with torch.no_grad():
        y = layer(x)
    with_gradients = layer(x)
    assert with_gradients.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, with_gradients)
    y += 1
    factor = torch.ones(N, device=device, requires_grad=True)
    (y * factor).sum().backward()
    torch.testing.assert_close(factor.grad, y.sum(0))


def test_only_one_copy_of_the_weight_is_in_memory(device: torch.device) -> None:
    layer = make_layer(device)
    layer.prepare()
    assert {name for name, _ in layer.named_buffers()}.isdisjoint({"qweight", "qzeros", "g_idx"})


def test_copies_and_pickles_hold_the_checkpoints_tensors(device: torch.device) -> None:
    layer = make_layer(device)
    before = snapshot(layer)
    layer.prepare()
    state = layer.__getstate__()
    assert "tiles" not in state["_buffers"]
    assert not state["_non_persistent_buffers_set"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other, before)
        assert other.is_prepared
    assert_same(GeneralQuantLinear(layer), before)
    assert_same(layer, before)


def test_moves_and_casts_keep_values_and_layout(device: torch.device) -> None:
    layer = make_layer(device)
    before = snapshot(layer)
    layer.prepare()
    layer.half()
    assert layer.to(torch.float64).scales.dtype == torch.float16
    assert_same(layer.to(device), before | {"bias": before["bias"].double()})
    assert layer.is_prepared


def test_new_values_are_laid_out_again(device: torch.device) -> None:
    layer, other = make_layer(device), make_layer(device)
    layer.prepare()
    layer.load_state_dict(other.state_dict())
    assert layer.is_prepared
    assert_same(layer, snapshot(other))
    third = make_layer(device)
    layer.load_packed(third.packed(), third.bias)
    assert layer.is_prepared
    assert_same(layer, snapshot(third))
    layer.qweight = other.qweight
    assert torch.equal(layer.qweight, other.qweight)
    assert torch.equal(layer.g_idx, third.g_idx)


def test_a_prepared_layer_compiles_into_one_graph(device: torch.device) -> None:
    layer = make_layer(device)
    layer.prepare()
    x = torch.randn(3, K, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_what_cannot_be_prepared_stays_and_says_why(device: torch.device) -> None:
    ragged = make_layer(device, act_order=False)
    ragged.g_idx[0] = 1
    ragged.prepare()
    assert not ragged.is_prepared
    assert "torch over tiles: g_idx does not give each group 32 inputs" in ragged.explain()

    class Hook:
        offload = True

    offloaded = make_layer(device)
    offloaded._hf_hook = Hook()
    offloaded.prepare()
    assert not offloaded.is_prepared
    assert "torch over tiles: accelerate offloads the tensors" in offloaded.explain()

    moved = make_layer(device)
    moved.prepare()
    assert moved.explain() == "torch over tiles: runs"
    moved.to("meta")
    assert not moved.is_prepared
    assert "torch over tiles: the tensors are on the meta device" in moved.explain()
