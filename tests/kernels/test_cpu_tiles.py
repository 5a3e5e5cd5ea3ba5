"""The CPU's products with tiles: against float64, for every instruction set, with broken input."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from auto_gptq.formats.tiles import TileTensors, run_length
from auto_gptq.kernels import decode_ops, native, ops, reference
from tests.kernels.test_tile_ops import operands, random_weight

assert ops and decode_ops  # importing them defines the operators

OPS = torch.ops.auto_gptq
CPU = torch.device("cpu")
BITS = (2, 3, 4, 8)
# Two bytes round x by at most 2^-15 of the largest of up to 128 neighbours, which for normal
# numbers is three times their size.  Errors of a sum add up as its terms do; by chance these
# cancel more.
TWO_BYTES = 6 / 2**15
# One byte of x, 32 neighbours at a time.
ONE_BYTE = 6 / 2**7


@pytest.fixture(autouse=True)
def _native() -> None:
    if not native.load():
        pytest.skip(native.reason())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def exact(x: Tensor, tiled: TileTensors, settings: tuple[int, ...], bias: Tensor | None) -> Tensor:
    weight = reference.dequantize_tiles(*operands(tiled), *settings, torch.float32)
    product = x.double() @ weight.double().t()
    return product if bias is None else product + bias


@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 96, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_products_are_near_float64(bits: int, group_size: int, act_order: bool) -> None:
    """K = 288 and 1120 are no whole tiles; 1120 is more than is unfolded at once."""
    for k, n in ((288, 96), (1120, 32)):
        _, tiled = random_weight(bits, group_size, k, n, CPU, act_order=act_order)
        settings = bits, group_size, k, n
        for m in (1, 3, 7, 35):
            x, bias = torch.randn(m, k), torch.randn(n)
            expected = exact(x, tiled, settings, bias)
            two = OPS.q_matmul(x, *operands(tiled), bias, *settings)
            assert relative_error(two, expected) < TWO_BYTES
            one = OPS.q_matmul_int8(x, *operands(tiled), bias, *settings)
            assert relative_error(one, expected) < ONE_BYTE


@pytest.mark.parametrize("bits", BITS)
def test_many_rows_in_one_byte_are_what_plain_torch_gives(bits: int) -> None:
    """The same numbers but for those that lie between two: an even count of them rounds apart."""
    for group_size, act_order in ((32, False), (64, True), (128, False)):
        _, tiled = random_weight(bits, group_size, 288, 96, CPU, act_order=act_order)
        arguments = torch.randn(35, 288), *operands(tiled), None, bits, group_size, 288, 96
        assert (
            relative_error(OPS.q_matmul_int8(*arguments), reference.q_matmul_int8(*arguments))
            < ONE_BYTE / 20
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_of_x_and_scales(dtype: torch.dtype) -> None:
    for scale_dtype in (torch.float32, torch.float16, torch.bfloat16):
        _, tiled = random_weight(4, 64, 128, 64, CPU, symmetric=True, dtype=scale_dtype)
        x = torch.randn(2, 3, 128).to(dtype)
        y = OPS.q_matmul(x, *operands(tiled), None, 4, 64, 128, 64)
        assert y.dtype == dtype
        assert y.shape == (2, 3, 64)
        rounding = torch.finfo(dtype).eps / 2
        assert relative_error(y, exact(x, tiled, (4, 64, 128, 64), None)) < TWO_BYTES + rounding


def test_edges_of_x() -> None:
    """No rows, zeros, the least and the largest numbers, a view; NaN and infinity spread."""
    _, tiled = random_weight(4, 64, 128, 64, CPU)
    settings = 4, 64, 128, 64

    def product(x: Tensor, op: str = "q_matmul") -> Tensor:
        return getattr(OPS, op)(x, *operands(tiled), None, *settings)

    for op in ("q_matmul", "q_matmul_int8"):
        assert product(torch.randn(0, 128), op).shape == (0, 64)
        assert product(torch.randn(2, 0, 128), op).shape == (2, 0, 64)
        assert not product(torch.zeros(6, 128), op).any()
        assert product(torch.full((6, 128), 1e-38), op).abs().max() < 1e-30
        for broken in (float("nan"), float("inf"), -float("inf")):
            for m in (1, 6, 34):
                x = torch.randn(m, 128)
                x[0, 77] = broken
                y = product(x, op)
                assert y[0].isnan().all()
                assert y[1:].isfinite().all()
    large = torch.randn(6, 128) * 1e30
    assert relative_error(product(large), exact(large, tiled, settings, None)) < TWO_BYTES
    wide = torch.randn(256, 6)
    assert torch.equal(product(wide.t()[:, ::2]), product(wide.t()[:, ::2].contiguous()))


def test_outliers_cost_only_their_neighbours() -> None:
    """An activation a thousand times the others does not round away those of other blocks."""
    _, tiled = random_weight(4, 128, 512, 64, CPU)
    settings = 4, 128, 512, 64
    x = torch.randn(1, 512)
    x[0, 3] = 1000.0
    only = x.clone()
    only[0, :128] = 0
    difference = OPS.q_matmul(x, *operands(tiled), None, *settings) - OPS.q_matmul(
        x - only, *operands(tiled), None, *settings
    )
    # What is left of the outlier's fp32 sum is subtracted away to 2^-24 of it.
    assert relative_error(difference, exact(only, tiled, settings, None)) < 1e-3


def test_outliers_in_one_byte_cost_only_few_neighbours() -> None:
    """With 2 and 3 bits few rows share a scale among 128 inputs, but not the shift of each word."""
    x = torch.randn(3, 512)
    x[:, 3] = 100.0
    rest = x.clone()
    rest[:, 3] = 0
    for bits in (2, 3, 4):
        _, tiled = random_weight(bits, 128, 512, 64, CPU)
        settings = bits, 128, 512, 64
        weight = reference.dequantize_tiles(*operands(tiled), *settings, torch.float32)
        others = OPS.q_matmul_int8(x, *operands(tiled), None, *settings) - x[:, 3:4] * weight[:, 3]
        assert relative_error(others, exact(rest, tiled, settings, None)) < 2 * ONE_BYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dense_weight_times_a_few_rows_is_near_float64(dtype: torch.dtype) -> None:
    """Rows that go four and one at a time, and as many as are torch's; K that fills no vectors."""
    for k in (8, 576, 1000, 12):
        weight = torch.randn(50, k).to(dtype)
        for m in (0, 1, 4, 7, 9):
            x = torch.randn(m, k).to(dtype)
            y = OPS.dense_matmul(x, weight)
            assert y.dtype == dtype
            assert y.shape == (m, 50)
            if m:
                expected = x.double() @ weight.double().t()
                assert relative_error(y, expected) < torch.finfo(dtype).eps + 1e-6  # fp32 sums
    with pytest.raises(RuntimeError, match=r"x is \[1, 8\] and weight is \[50, 12\]"):
        OPS.dense_matmul(torch.zeros(1, 8), torch.zeros(50, 12))
    torch.library.opcheck(OPS.dense_matmul, (torch.randn(2, 16), torch.randn(8, 16)))


def test_opcheck_of_int8() -> None:
    _, tiled = random_weight(4, 32, 96, 64, CPU, act_order=True)
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(64)
    torch.library.opcheck(OPS.q_matmul_int8, (x, *operands(tiled), bias, 4, 32, 96, 64))


class Tiled(ctypes.Structure):
    """The struct ``auto_gptq::Tiled`` of csrc/launch.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tiles", "scales", "zeros", "perm")),
        *((name, ctypes.c_int64) for name in ("k", "n", "groups", "group_size")),
        *((name, ctypes.c_int32) for name in ("bits", "run", "scale_type")),
    )


class Rounded(ctypes.Structure):
    """The struct ``auto_gptq::Rounded`` of csrc/launch.h."""

    _fields_ = (
        ("m", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("terms", "few", "unit")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "sums", "shifts")),
    )


# The portable code has no product of its own for few rows.
SETS = {"portable": 0, "avx2": 1, "avx512-vnni": 3}
CASES = {
    f"{name}-{'few' if few else 'many'}": (isa, few)
    for name, isa in SETS.items()
    for few in (False, True)
    if isa or not few
}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa, few", CASES.values(), ids=CASES.keys())
def test_every_instruction_set_gives_the_product(
    isa: int, bits: int, group_size: int, few: bool
) -> None:
    """The operators take the widest set there is; the others are called without torch."""
    library = ctypes.CDLL(str(native._LIBRARY))
    if isa > library.auto_gptq_cpu_best_isa():
        pytest.skip("this machine lacks the instructions")
    if few and bits == 4:
        pytest.skip("4 bits have one way for all rows")
    k, n, m = 288, 96, 9
    _, tiled = random_weight(bits, group_size, k, n, CPU, act_order=True)
    settings = bits, group_size, k, n
    library.auto_gptq_cpu_bytes_of_x.restype = ctypes.c_int64
    width = library.auto_gptq_cpu_bytes_of_x(bits, int(few))
    x, tiles = torch.randn(m, k), -(-k // 64)
    expected = exact(x, tiled, settings, None)
    pointers = [0 if t is None else t.data_ptr() for t in operands(tiled)]
    groups, run = tiled.scales.shape[0], run_length(group_size, k)
    weight = Tiled(*pointers, k, n, groups, group_size, bits, run, 1)
    for terms in (2,) if few and bits == 8 else (1, 2):
        buffers = (
            torch.zeros(m, tiles, terms, width, dtype=torch.int8),
            torch.zeros(m, tiles, 2),
            torch.zeros(m, tiles, 2),
            torch.zeros(m, tiles, 8, dtype=torch.int32),
        )
        unit = 2 if group_size == 128 and bits != 8 else 1
        rounded = Rounded(m, terms, few, unit, *(t.data_ptr() for t in buffers))
        y = torch.zeros(m, n)
        wide = [ctypes.c_int64(i) for i in (0, m, 0, n)]
        arrays = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
        both = ctypes.byref(weight), ctypes.byref(rounded)
        library.auto_gptq_cpu_round(both[0], arrays[0], both[1], *wide[:2], isa)
        library.auto_gptq_cpu_multiply_tiles(*both, arrays[1], *wide[2:], isa)
        assert relative_error(y, expected) < (ONE_BYTE if terms == 1 else TWO_BYTES)


BROKEN = {
    "tiles": (0, torch.zeros(1, 2, 511, dtype=torch.int32), r"tiles is \[1, 2, 511\]"),
    "scales": (1, torch.zeros(2, 63), r"scales is \[2, 63\]"),
    "zeros": (2, torch.zeros(2, 64), "zeros is Float, but must be Byte"),
    "perm": (3, torch.zeros(127, dtype=torch.int32), r"perm is \[127\]"),
    "bias": (4, torch.zeros(63), r"bias is \[63\]"),
}


@pytest.mark.parametrize("place, tensor, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_operand_is_refused_by_name(place: int, tensor: Tensor, message: str) -> None:
    _, tiled = random_weight(4, 64, 128, 64, CPU)
    arguments = [*operands(tiled), torch.zeros(64)]
    arguments[place] = tensor
    with pytest.raises(RuntimeError, match=message):
        OPS.q_matmul(torch.zeros(1, 128), *arguments, 4, 64, 128, 64)


def test_a_permutation_out_of_range_is_refused() -> None:
    _, tiled = random_weight(4, 64, 128, 64, CPU, act_order=True)
    assert tiled.perm is not None
    tiled.perm[5] = 128
    with pytest.raises(RuntimeError, match=r"perm\[5\] is 128, but must be in \[0, 128\)"):
        OPS.q_matmul(torch.zeros(1, 128), *operands(tiled), None, 4, 64, 128, 64)
