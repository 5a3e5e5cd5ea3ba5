"""Every operator: its fake implementation, and the kernel that runs here against plain torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq.formats.gptq import pack_layer, trivial_g_idx
from auto_gptq.formats.grid import Grid, GridRule
from auto_gptq.kernels import decode_ops, expert_ops, native, ops, reference

assert ops and decode_ops and expert_ops  # importing them defines the operators

K, N, GROUP = 96, 64, 32
OPS = torch.ops.auto_gptq


def _packed(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = pack_layer(
        torch.randint(0, 1 << bits, (N, K)),
        torch.randn(N, K // GROUP) * 0.01,
        torch.randint(0, 1 << bits, (N, K // GROUP)),
        trivial_g_idx(K, GROUP),
        bits=bits,
    )
    tensors = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
    return tuple(tensor.to(device) for tensor in tensors)  # type: ignore[return-value]


def _block(device: torch.device, columns: int = 40) -> dict[str, Any]:
    """Arguments of solve_columns; the factor is a part of a larger one, as in the solver."""
    grid = GridRule(4).span(-torch.rand(N), torch.rand(N))
    factor = torch.randn(128, 128).triu() * 0.1 + torch.eye(128)
    return {
        "weight": torch.randn(columns, N, device=device),
        "codes": torch.empty(columns, N, dtype=torch.uint8, device=device),
        "errors": torch.empty(columns, N, device=device),
        "inverse": factor.to(device)[8 : 8 + columns, 8 : 8 + columns],
        "scales": torch.stack([grid.scale, grid.scale * 2]).to(device),
        "zeros": torch.stack([grid.zero, grid.zero]).to(device),
        "group": (torch.arange(columns, device=device) % 2),
        "maxq": 15,
    }


def _groups(device: torch.device, rule: GridRule) -> tuple[Any, ...]:
    """Arguments of fit_grids; the last group is short."""
    return (
        torch.randn(80, N, device=device),
        torch.rand(80, device=device),
        torch.tensor(rule.factors, device=device),
        GROUP,
        rule.bits,
        rule.symmetric,
        rule.lowest_zero,
        rule.scale_dtype,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_opcheck_of_the_packed_products(bits: int, device: torch.device) -> None:
    native.load()
    packed = _packed(bits, device)
    x = torch.randn(2, 3, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device)
    torch.library.opcheck(OPS.dequantize, (*packed, bits, 1, torch.float16))
    torch.library.opcheck(OPS.q_linear, (x, *packed, bias, bits, 1))
    torch.library.opcheck(OPS.q_linear, (x.detach().half(), *packed, None, bits, 0))


def test_opcheck_of_the_products_of_packed_experts(device: torch.device) -> None:
    experts = zip(*(_packed(4, device) for _ in range(3)), strict=True)
    packed = [list(tensors) for tensors in experts]
    x, ends = torch.randn(7, K, device=device), torch.tensor([2, 2, 7], device=device)
    torch.library.opcheck(OPS.q_linear_experts, (x, ends, *packed, 4, 1))


def test_every_operator_is_opchecked() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    checked = set(re.findall(r"check\(\s*(?:OPS|ops)\.(\w+)", source))
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ours = {name.partition(".")[0] for space, _, name in names if space == "auto_gptq"}
    assert checked == ours


def test_opcheck_of_the_solver_steps(device: torch.device) -> None:
    native.load()
    torch.library.opcheck(OPS.fit_grids, _groups(device, GridRule(4)))
    torch.library.opcheck(OPS.solve_columns, tuple(_block(device).values()))


def test_solve_columns_agrees_with_plain_torch(device: torch.device) -> None:
    native.load()
    ours, plain = _block(device), _block(device)
    plain["weight"] = ours["weight"].clone()
    plain |= {key: ours[key] for key in ("inverse", "scales", "zeros", "group")}
    OPS.solve_columns(**ours)
    reference.solve_columns(**plain)
    codes, errors = ours["codes"], ours["errors"]
    expected_codes, expected_errors = plain["codes"], plain["errors"]
    assert (codes != expected_codes).any(0).sum() <= 1  # a tie may fall to either side
    same = (codes == expected_codes).all(0)
    assert torch.allclose(errors[:, same], expected_errors[:, same], atol=1e-5)
    assert torch.allclose(ours["weight"][:, same], plain["weight"][:, same], atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym", "signed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_fit_grids_agrees_with_plain_torch(
    bits: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    native.load()
    arguments = _groups(device, GridRule(bits, kind != "asym", dtype, signed=kind == "signed"))
    scales, zeros = OPS.fit_grids(*arguments)
    expected_scales, expected_zeros = reference.fit_grids(*arguments)
    same = torch.isclose(scales, expected_scales, rtol=1e-6) & (zeros == expected_zeros)
    assert (~same).sum() <= 2  # two factors of nearly equal error
    assert torch.equal(scales, scales.to(dtype).float())
    assert bool((scales < 0).any()) == (kind == "signed" and bits < 8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_ranges_never_have_a_larger_weighted_error(
    bits: int, device: torch.device
) -> None:
    native.load()
    arguments = _groups(device, GridRule(bits))
    weight, importance = arguments[:2]

    def error(factors: Tensor) -> Tensor:
        found = OPS.fit_grids(*arguments[:2], factors, 80, *arguments[4:])
        grid = Grid(*found, (1 << bits) - 1)
        return importance @ (weight - grid.from_codes(grid.to_codes(weight))).square()

    searched, min_max = error(arguments[2]), error(torch.ones(1, device=device))
    assert (searched <= min_max * (1 + 1e-6)).all()
    assert searched.sum() < min_max.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": torch.tensor([0, 1, 2] * 13 + [0])}, r"group\[2\] is 2"),
        ({"scales": torch.ones(2, N + 1)}, r"scales is \[2, 65\]"),
        ({"weight": torch.ones(40, N).half()}, "weight must be Float"),
        ({"inverse": torch.ones(39, 40)}, r"inverse is \[39, 40\]"),
    ],
    ids=["group", "scales", "dtype", "factor"],
)
def test_the_compiled_solver_names_what_does_not_fit(
    change: dict[str, Tensor], message: str
) -> None:
    if not native.load():
        pytest.skip(native.reason())
    with pytest.raises(RuntimeError, match=message):
        OPS.solve_columns(**(_block(torch.device("cpu")) | change))


def test_the_gradient_is_that_of_a_dense_layer(device: torch.device) -> None:
    packed = _packed(4, device)
    weight = reference.dequantize(*packed, 4, 1, torch.float32)
    x = torch.randn(5, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    OPS.q_linear(x, *packed, bias, 4, 1).square().sum().backward()
    found = x.grad, bias.grad
    x.grad = bias.grad = None
    torch.nn.functional.linear(x, weight, bias).square().sum().backward()
    assert torch.allclose(found[0], x.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(found[1], bias.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_of_the_solver_are_packed_and_dequantized_as_by_plain_torch(
    bits: int, device: torch.device
) -> None:
    native.load()
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device=device)
    scales = torch.randn(N, 3, device=device)
    zeros = torch.randint(0, 1 << bits, (N, 3), dtype=torch.int32, device=device)
    g_idx = torch.randint(0, 3, (K,), dtype=torch.int32, device=device)
    torch.library.opcheck(OPS.pack_codes, (codes, bits))
    assert torch.equal(OPS.pack_codes(codes, bits), reference.pack_codes(codes, bits))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = codes, scales, zeros, g_idx, dtype
        torch.library.opcheck(OPS.dequantize_codes, given)
        assert torch.equal(OPS.dequantize_codes(*given), reference.dequantize_codes(*given))


def test_opcheck_of_solving_a_matrix(device: torch.device) -> None:
    native.load()
    block = _block(device)
    rest = torch.rand(40, device=device), torch.ones(1, device=device), 0, 4, True, 1
    del block["maxq"]
    torch.library.opcheck(OPS.solve_matrix, (*block.values(), *rest, torch.float16))
