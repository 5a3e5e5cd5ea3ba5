"""``GPTQ`` and ``Quantizer`` as AutoGPTQ's users call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from auto_gptq.errors import QuantizedStateError
from auto_gptq.quantization import GPTQ, Quantizer, quantize
from auto_gptq.quantization.solver import squared_error


def calibrated(layer: nn.Module, inputs: Tensor, bits: int = 4, sym: bool = True) -> GPTQ:
    gptq = GPTQ(layer)
    gptq.quantizer.configure(bits=bits, sym=sym, perchannel=True)
    for sequence in inputs:
        gptq.add_batch(sequence, None)
    return gptq


def test_no_golden_layer_gets_worse_than_with_autogptq(shared: Path) -> None:
    manifest = json.loads((shared / "golden" / "manifest.json").read_text())
    for name, settings in manifest.items():
        golden = load_file(shared / "golden" / f"{name}.safetensors")
        layer = nn.Linear(golden["weight"].shape[1], golden["weight"].shape[0], bias=False)
        layer.weight.data = golden["weight"].clone()
        gptq = calibrated(layer, golden["inputs"], settings["bits"], settings["sym"])
        # The inputs were stored in float16; the Hessian was made of their originals.
        assert (gptq.H - golden["hessian"]).norm() < 1e-3 * golden["hessian"].norm(), name
        gptq.H.copy_(golden["hessian"])
        scale, zero, g_idx = gptq.fasterquant(
            percdamp=settings["percdamp"],
            group_size=settings["group_size"],
            actorder=settings["desc_act"],
            static_groups=settings["static_groups"],
        )
        assert scale.dtype == zero.dtype == torch.float32
        assert scale.shape == zero.shape == golden["solver_scales"].shape, name
        assert torch.equal(g_idx, golden["g_idx"]), name
        codes = layer.weight / scale[:, g_idx] + zero[:, g_idx]
        assert torch.allclose(codes, codes.round(), atol=1e-3), name
        ours = squared_error(golden["weight"], layer.weight.detach(), golden["hessian"])
        theirs = squared_error(golden["weight"], golden["solved_weight"], golden["hessian"])
        assert ours <= theirs * 1.001, f"{name}: {float(ours / theirs)}"


def test_two_dimensional_inputs_count_as_one_sequence(device: torch.device) -> None:
    layer = nn.Linear(64, 32, device=device)
    x = torch.randn(3, 20, 64, device=device)
    one, other = calibrated(layer, x), GPTQ(layer)
    other.add_batch(x, layer(x))
    assert one.nsamples == other.nsamples == 3
    assert (one.rows, one.columns, one.dev) == (32, 64, layer.weight.device)
    wanted = 2 / 3 * torch.einsum("bti,btj->ij", x, x)
    assert torch.allclose(one.H, wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(other.H, wanted, rtol=1e-4, atol=1e-4)


def test_conv1d_gets_the_solution_of_its_linear_twin() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(64, 32), Conv1D(32, 64)
    conv.weight.data = linear.weight.data.t().clone()
    x = torch.randn(2, 50, 64)
    results = [calibrated(layer, x).fasterquant(group_size=32) for layer in (linear, conv)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert torch.equal(conv.weight.t(), linear.weight)


def test_conv2d_is_solved_over_its_patches() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    before = conv.weight.detach().clone()
    gptq = GPTQ(conv)
    gptq.quantizer.configure(bits=8, sym=True, perchannel=True)
    gptq.add_batch(torch.randn(2, 4, 6, 6), None)
    assert gptq.nsamples == 2
    gptq.fasterquant()
    assert 0 < (conv.weight - before).abs().max() < 0.01


def test_solving_twice_is_refused() -> None:
    gptq = calibrated(nn.Linear(32, 32), torch.randn(2, 8, 32))
    gptq.fasterquant()
    with pytest.raises(QuantizedStateError, match="freed"):
        gptq.fasterquant()
    gptq.free()


def test_solving_without_a_width_is_refused() -> None:
    with pytest.raises(ValueError, match="configure"):
        GPTQ(nn.Linear(32, 32)).fasterquant()


def test_half_precision_layers_keep_their_dtype() -> None:
    layer = nn.Linear(64, 32).half()
    gptq = calibrated(layer, torch.randn(2, 30, 64).half())
    scale, _, _ = gptq.fasterquant(group_size=32, actorder=True)
    assert layer.weight.dtype == torch.float16
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("perchannel", [True, False], ids=["per channel", "per tensor"])
def test_a_quantizer_rounds_to_within_half_a_step(bits: int, sym: bool, perchannel: bool) -> None:
    quantizer = Quantizer()
    assert not quantizer.enabled()
    weight = torch.randn(16, 40)
    assert torch.equal(quantizer.quantize(weight), weight)  # nothing fitted yet
    quantizer.configure(bits, perchannel=perchannel, sym=sym)
    quantizer.find_params(weight, weight=True)
    assert quantizer.enabled()
    assert quantizer.ready()
    assert quantizer.scale.shape == quantizer.zero.shape == (16, 1)
    error = (quantizer.quantize(weight) - weight).abs()
    # A symmetric grid has one code less above zero than below.
    assert (error <= quantizer.scale * (1.001 if sym else 0.501)).all()
    assert set(quantizer.zero.unique().tolist()) == {2 ** (bits - 1)} or not sym


def test_a_row_of_one_sign_keeps_its_largest_weight() -> None:
    """AutoGPTQ centred the zero of an all-positive row but not its range, and clipped half."""
    quantizer = Quantizer()
    quantizer.configure(4, perchannel=True, sym=True)
    weight = torch.rand(4, 64)
    quantizer.find_params(weight, weight=True)
    assert ((quantizer.quantize(weight) - weight).abs() <= quantizer.scale).all()


def test_searching_lowers_the_error() -> None:
    weight = torch.randn(16, 256) ** 3
    errors = []
    for mse in (False, True):
        quantizer = Quantizer()
        quantizer.configure(3, perchannel=True, sym=True, mse=mse)
        quantizer.find_params(weight, weight=True)
        errors.append((quantizer.quantize(weight) - weight).abs().pow(2.4).sum(1))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize(
    ("shape", "grids"),
    [((6, 8), (1, 8)), ((2, 6, 8), (1, 1, 8)), ((2, 8, 3, 3), (1, 8, 1, 1))],
    ids=["2-D", "3-D", "4-D"],
)
@pytest.mark.parametrize("perchannel", [True, False], ids=["per channel", "per tensor"])
def test_activations_get_a_scale_per_channel(
    shape: tuple[int, ...], grids: tuple[int, ...], perchannel: bool
) -> None:
    quantizer = Quantizer()
    quantizer.configure(8, perchannel=perchannel, sym=False)
    x = torch.randn(shape)
    quantizer.find_params(x)
    assert tuple(quantizer.scale.shape) == grids
    assert ((quantizer.quantize(x) - x).abs() <= 0.501 * quantizer.scale).all()


def test_trits_take_three_values() -> None:
    quantizer = Quantizer()
    quantizer.configure(2, trits=True)
    weight = torch.tensor([[-2.0, -0.9, 0.3, 1.1, 2.0]])
    quantizer.find_params(weight, weight=True)
    assert quantizer.quantize(weight).tolist() == [[-2.0, 0.0, 0.0, 2.0, 2.0]]


def test_the_function_takes_numbers_and_tensors() -> None:
    x, scale, zero = torch.tensor([-9.0, 0.4, 0.6, 90.0]), torch.tensor(1.0), torch.tensor(8.0)
    for maxq in (15, torch.tensor(15)):
        assert quantize(x, scale, zero, maxq).tolist() == [-8.0, 0.0, 1.0, 7.0]
