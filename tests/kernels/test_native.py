"""The compiled operators against a float64 reference that shares no code with the library."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import auto_gptq.kernels.ops  # noqa: F401 (defines the schemas)
from auto_gptq.kernels import native

pytestmark = pytest.mark.skipif(not native.load(), reason=native.reason())

K, N = 256, 96  # two runs of the kernel along K; three blocks of 32 columns
BITS = (2, 3, 4, 8)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Array = npt.NDArray[Any]


def words_of(codes: Array, bits: int) -> Tensor:
    """Pack along the last axis by writing out every bit."""
    each = (codes[..., None] >> np.arange(bits)) & 1
    stream = np.ascontiguousarray(each.reshape(*codes.shape[:-1], -1).astype(np.uint8))
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(words.copy())


@dataclass(frozen=True)
class Packed:
    """A random packed weight and what it stands for."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    zero_offset: int

    codes: Array  # [K, N]
    zeros: Array  # [G, N]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.qweight, self.qzeros, self.scales, self.g_idx

    def weight(self) -> Array:  # [N, K] float64
        group = self.g_idx.numpy()
        scales = self.scales.double().numpy()
        weight: Array = ((self.codes - self.zeros[group]) * scales[group]).T
        return weight

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        settings = (self.bits, self.zero_offset, dtype)
        weight: Tensor = torch.ops.auto_gptq.dequantize(*self.arguments, *settings)
        return weight

    def q_linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        operands = (x, *self.arguments, bias)
        y: Tensor = torch.ops.auto_gptq.q_linear(*operands, self.bits, self.zero_offset)
        return y


def random_packed(
    bits: int = 4,
    group_size: int = 32,
    *,
    k: int = K,
    act_order: bool = False,
    zero_offset: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Packed:
    random = np.random.default_rng(bits)
    groups = 1 if group_size == -1 else k // group_size
    codes = random.integers(0, 2**bits, (k, N))
    zeros = random.integers(0, 2**bits, (groups, N))
    g_idx = np.arange(k, dtype=np.int32) * groups // max(k, 1)
    if act_order:
        random.shuffle(g_idx)
    return Packed(
        words_of(codes.T, bits).T.contiguous(),
        words_of((zeros - zero_offset) % 2**bits, bits),
        torch.from_numpy(random.uniform(0.001, 0.02, (groups, N))).to(dtype),
        torch.from_numpy(g_idx),
        bits,
        zero_offset,
        codes,
        zeros,
    )


def assert_product(y: Tensor, packed: Packed, x: Tensor, bias: Tensor | None) -> None:
    """Compare with float64: rounding of fp32 sums of K products, then one rounding of the result.

    The kernel adds code * x and zero * x apart, so the size of what is summed is theirs, not that
    of the weights.  Blocked sums need about 3 roundings; a wrong code costs far more than 16.
    """
    group, exact = packed.g_idx.numpy(), x.double().numpy()
    scales = packed.scales.double().numpy()[group]
    size = np.abs(exact) @ ((packed.codes + packed.zeros[group]) * scales)
    expected = exact @ packed.weight().T
    if bias is not None:
        expected = expected + bias.double().numpy()
        size = size + np.abs(bias.double().numpy())
    bound = 16 * torch.finfo(torch.float32).eps * size
    if y.dtype != torch.float32:
        bound = bound + torch.finfo(y.dtype).eps * np.abs(expected)
    error = np.abs(y.double().numpy() - expected)
    assert (error <= bound).all(), f"error {error.max()} at a bound of {bound.min()}"


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_rounds_the_exact_weight_once(
    bits: int, group_size: int, act_order: bool, dtype: torch.dtype
) -> None:
    for zero_offset, scale_type in itertools.product((0, 1), FLOATS):
        packed = random_packed(
            bits, group_size, act_order=act_order, zero_offset=zero_offset, dtype=scale_type
        )
        # (code - zero) * scale rounded to fp32 is the exact product for 16-bit scales.
        expected = torch.from_numpy(packed.weight()).to(torch.float32).to(dtype)
        actual = packed.dequantize(dtype)
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 3, 17, 70])
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_q_linear_multiplies_by_the_weight(
    bits: int, group_size: int, act_order: bool, m: int, dtype: torch.dtype
) -> None:
    x = random_x(m, K, dtype=dtype)
    for zero_offset, bias in itertools.product((0, 1), (None, random_x(N, dtype=dtype))):
        packed = random_packed(bits, group_size, act_order=act_order, zero_offset=zero_offset)
        y = packed.q_linear(x, bias)
        assert y.dtype == dtype
        assert y.shape == (m, N)
        assert_product(y, packed, x, bias)


def test_ordered_and_mixed_streams_add_up_in_one_weight() -> None:
    packed = random_packed()
    packed.g_idx[64:128] = packed.g_idx[64:128][torch.arange(64) * 3 % 64]
    assert_product(packed.q_linear(random_x(5, K)), packed, random_x(5, K), None)


@pytest.mark.parametrize("m", [2, 70])
def test_q_linear_takes_any_leading_shape_and_strides(m: int) -> None:
    packed = random_packed()
    x = random_x(3, K, m).transpose(1, 2)
    y = packed.q_linear(x)
    assert_product(y.view(3 * m, N), packed, x.reshape(-1, K), None)
    assert packed.q_linear(x[0, 0]).shape == (N,)


def test_packed_tensors_may_have_strides() -> None:
    packed = random_packed()
    names = ("qweight", "qzeros", "scales")
    other = replace(packed, **{name: getattr(packed, name).t().clone().t() for name in names})
    assert torch.equal(other.q_linear(random_x(3, K)), packed.q_linear(random_x(3, K)))


@pytest.mark.parametrize("m", [0, 2, 70])
def test_no_input_channels_leave_the_bias(m: int) -> None:
    packed = random_packed(group_size=-1, k=0)
    bias = random_x(N)
    assert torch.equal(packed.q_linear(random_x(m, 0), bias), bias.expand(m, N))
    assert packed.dequantize(torch.float16).shape == (N, 0)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_wider_than_a_panel_is_multiplied_in_pieces(bits: int) -> None:
    """16 MB of fp32 are 64 rows at K = 65536; N = 96 then makes a panel and a half."""
    packed = random_packed(bits, 128, k=65536)
    x, bias = random_x(70, 65536), random_x(N)
    assert_product(packed.q_linear(x, bias), packed, x, bias)


def test_sixteen_bit_edge_values_survive() -> None:
    """Subnormals, the largest halves, infinity and NaN, read as scales and written as weights."""
    edges = [0.0, 2.0**-24, 2.0**-15, 65504.0, float("inf"), float("nan"), 6e-8, 1e30]
    for scale_type, dtype in itertools.product(FLOATS, FLOATS):
        packed = random_packed(bits=8, group_size=-1, dtype=scale_type)
        packed = replace(packed, scales=torch.tensor(edges * (N // 8))[None].to(scale_type))
        group = packed.g_idx.numpy()
        difference = torch.from_numpy(packed.codes - packed.zeros[group]).float()
        expected = (difference * packed.scales.float()).t().to(dtype)
        actual = packed.dequantize(dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "qweight-shape": ({"qweight": torch.zeros(31, N, dtype=torch.int32)}, r"qweight is \[31, 96\]"),
    "qweight-dim": ({"qweight": torch.zeros(32, dtype=torch.int32)}, r"qweight is \[32\]"),
    "qweight-dtype": ({"qweight": torch.zeros(32, N)}, "qweight is Float, but must be Int"),
    "qzeros-shape": ({"qzeros": torch.zeros(8, 11, dtype=torch.int32)}, r"qzeros is \[8, 11\]"),
    "qzeros-groups": ({"qzeros": torch.zeros(7, 12, dtype=torch.int32)}, r"qzeros is \[7, 12\]"),
    "qzeros-dtype": ({"qzeros": torch.zeros(8, 12, dtype=torch.int64)}, "qzeros is Long"),
    "scales-dtype": ({"scales": torch.zeros(8, N).double()}, "scales is Double, but must be Float"),
    "scales-shape": ({"scales": torch.zeros(8, N + 1)}, r"scales is \[8, 97\]"),
    "g_idx-shape": ({"g_idx": torch.zeros(K - 1, dtype=torch.int32)}, r"g_idx is \[255\]"),
    "g_idx-dtype": ({"g_idx": torch.zeros(K, dtype=torch.int64)}, "g_idx is Long"),
    "g_idx-high": ({"g_idx": torch.arange(K).int() // 28}, r"g_idx\[224\] is 8, .*\[0, 8\)"),
    "g_idx-negative": ({"g_idx": torch.arange(K, dtype=torch.int32) - 1}, r"g_idx\[0\] is -1"),
    "bits": ({"bits": 5}, "bits is 5, but must be 2, 3, 4 or 8"),
    "zero_offset": ({"zero_offset": 2}, "zero_offset is 2"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_weight_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    packed = replace(random_packed(), **change)
    with pytest.raises(RuntimeError, match=message):
        packed.q_linear(random_x(1, K))
    with pytest.raises(RuntimeError, match=message):
        packed.dequantize(torch.float32)


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.zeros(2, K + 1), None, r"x is \[2, 257\], but must be \[\.\.\., K\] with K = 256"),
        (torch.tensor(1.0), None, r"x is \[\]"),
        (torch.zeros(2, K).double(), None, "x is Double"),
        (torch.zeros(2, K), torch.zeros(N - 1), r"bias is \[95\], but must be \[N\] = \[96\]"),
        (torch.zeros(2, K), torch.zeros(1, N), r"bias is \[1, 96\]"),
        (torch.zeros(2, K), torch.zeros(N, dtype=torch.int32), "bias is Int"),
    ],
    ids=["x-shape", "x-scalar", "x-dtype", "bias-shape", "bias-dim", "bias-dtype"],
)
def test_a_broken_operand_is_refused_by_name(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        random_packed().q_linear(x, bias)
    with pytest.raises(RuntimeError, match="dtype is Int, but must be Float, Half or BFloat16"):
        random_packed().dequantize(torch.int32)


class Launch(ctypes.Structure):
    """The struct ``auto_gptq::Packed`` of csrc/launch.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales", "g_idx", "stream")),
        *((name, ctypes.c_int64) for name in ("k", "n", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "zero_offset", "scale_type")),
    )


@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_product(isa: int, bits: int, act_order: bool) -> None:
    """The operators take the widest set there is; the others are called without torch."""
    library = ctypes.CDLL(str(native._LIBRARY))
    if isa > library.auto_gptq_cpu_best_isa():
        pytest.skip("this machine lacks the instructions")
    packed, m = random_packed(bits, act_order=act_order), 5
    x, stream = random_x(m, K), torch.empty(K // 32, dtype=torch.int32)
    scaled, sums, y = torch.empty(m, K), torch.empty(m, K // 32), torch.empty(m, N)
    weight = torch.empty(N, K)

    def call(name: str, *arguments: Any) -> None:
        plain = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        wide = (ctypes.c_int64(a) if isinstance(a, int) else a for a in plain)
        getattr(library, f"auto_gptq_cpu_{name}")(*wide)

    tensors = (*packed.arguments, stream)
    scalars = (K, N, len(packed.scales), bits, packed.zero_offset, 1)
    launch = ctypes.byref(Launch(*(t.data_ptr() for t in tensors), *scalars))
    call("classify_streams", packed.g_idx, K, len(packed.scales), stream)
    call("prepare_activations", x, m, K, bits, scaled, sums)
    call("q_linear", launch, x, scaled, sums, m, None, y, 0, N, isa)
    call("dequantize", launch, 0, N, weight, 0, isa)
    assert_product(y, packed, x, None)
    assert torch.equal(weight, packed.dequantize(torch.float32))


def test_the_operators_keep_torchs_rules() -> None:
    packed = random_packed()
    dequantize, q_linear = torch.ops.auto_gptq.dequantize, torch.ops.auto_gptq.q_linear
    torch.library.opcheck(dequantize.default, (*packed.arguments, 4, 1, torch.float16))
    for m in (3, 70):
        operands = (random_x(m, K), *packed.arguments, random_x(N))
        torch.library.opcheck(q_linear.default, (*operands, 4, 1))
