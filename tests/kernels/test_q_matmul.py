"""q_matmul against float64: no more than twice the error of the plain product in 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from auto_gptq.formats.tiles import TileTensors
from auto_gptq.kernels import reference
from tests.kernels.test_tile_ops import BITS, OPS, operands, random_weight

Settings = tuple[int, int, int, int]  # bits, group_size, K, N


def multiply(
    x: Tensor, tiled: TileTensors, settings: Settings, bias: Tensor | None = None
) -> Tensor:
    y: Tensor = OPS.q_matmul(x, *operands(tiled), bias, *settings)
    return y


def exact_weight(tiled: TileTensors, settings: Settings) -> Tensor:
    """Give W in float64; 16-bit scales times whole numbers are exact in fp32."""
    return reference.dequantize_tiles(*operands(tiled), *settings, torch.float32).double()


def assert_as_good_as_plain(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    """Compare root mean square errors with those of the product of 16-bit numbers."""
    wide = None if bias is None else bias.double()
    expected = F.linear(x.double(), weight, wide)
    plain = F.linear(x, weight.to(x.dtype), bias)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error, allowed = (y.double() - expected).norm(), (plain.double() - expected).norm()
    assert error <= 2 * allowed, f"error {error / expected.norm()}, plain {allowed}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [16, 32, 48, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_the_product_is_as_good_as_the_plain_one(
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    on_cpu = device.type == "cpu"
    # K is no multiple of a tile, and one of pairs of tiles.
    for k, n in [(288, 96)] if on_cpu else [(864, 416), (1024, 448)]:
        settings = bits, group_size, k, n
        _, tiled = random_weight(*settings, device, symmetric=symmetric, act_order=act_order)
        weight = exact_weight(tiled, settings)
        bias = torch.randn(n, device=device).to(dtype)
        for m in (1, 3) if on_cpu else (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 33, 300):
            x = torch.randn(m, k, device=device).to(dtype)
            assert_as_good_as_plain(multiply(x, tiled, settings, bias), x, weight, bias)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_scales_of_any_type_go_with_any_activations(
    group_size: int, scale_dtype: torch.dtype, device: torch.device
) -> None:
    settings = 4, group_size, 256, 128
    _, tiled = random_weight(*settings, device, dtype=scale_dtype)
    weight = exact_weight(tiled, settings)
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 12):
            x = torch.randn(m, 256, device=device).to(dtype)
            assert_as_good_as_plain(multiply(x, tiled, settings), x, weight)


def test_large_means_do_not_cost_accuracy(device: torch.device) -> None:
    """Kernels take zero points out of sums; sums of activations of one sign are large."""
    for bits in BITS:
        settings = bits, 128, 1024, 128
        _, tiled = random_weight(*settings, device, symmetric=True)
        weight = exact_weight(tiled, settings)
        for dtype in (torch.float16, torch.bfloat16):
            x = (torch.rand(4, 1024, device=device) + 8).to(dtype)
            assert_as_good_as_plain(multiply(x, tiled, settings), x, weight)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,), (2, 3), (2, 1, 5)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], device: torch.device) -> None:
    settings = 4, 32, 96, 64
    _, tiled = random_weight(*settings, device)
    x = torch.randn(*shape, 96, device=device).half()
    y = multiply(x, tiled, settings)
    assert y.shape == (*shape, 64)
    if x.numel():
        assert_as_good_as_plain(y, x, exact_weight(tiled, settings))
    assert multiply(x.new_zeros(96), tiled, settings).shape == (64,)


def test_strides_and_odd_addresses_are_taken(device: torch.device) -> None:
    settings = 4, 32, 96, 64
    _, tiled = random_weight(*settings, device, act_order=True)
    weight = exact_weight(tiled, settings)
    storage = torch.randn(3 * 96 + 1, device=device).half()
    transposed = torch.randn(96, 3, device=device).half().t()
    for x in (
        storage[1:].view(3, 96),
        transposed,
        torch.randn(3, 192, device=device).half()[:, ::2],
    ):
        assert_as_good_as_plain(multiply(x, tiled, settings), x, weight)
    # A file may hold tensors at any address.
    shifted = TileTensors(*(None if t is None else _shifted(t) for t in operands(tiled)))  # type: ignore[arg-type]
    assert torch.equal(multiply(x, shifted, settings), multiply(x, tiled, settings))


def _shifted(tensor: Tensor) -> Tensor:
    """Copy a tensor to an address that is one element beyond a vector's."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


def test_unequal_devices_and_shapes_are_refused_by_name(device: torch.device) -> None:
    settings = 4, 32, 96, 64
    _, tiled = random_weight(*settings, device)
    if device.type == "cpu":
        pytest.skip("plain torch checks nothing")
    with pytest.raises(RuntimeError, match=r"x is \[2, 64\], but must be \[\.\.\., K\]"):
        multiply(torch.zeros(2, 64, device=device), tiled, settings)
    with pytest.raises(RuntimeError, match="x is not on the device of tiles"):
        multiply(torch.zeros(2, 96), tiled, settings)
    with pytest.raises(RuntimeError, match=r"scales is \[3, 64\], but must be .* = \[2, 64\]"):
        multiply(torch.zeros(2, 96, device=device), tiled, (4, 48, 96, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 6, 16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("k", "n"),
    [(2048, 1024), (4096, 4096), (14336, 4096), (1024, 8192), (1024, 14336), (1024, 20480)],
)
def test_every_row_of_the_table_of_shapes(k: int, n: int, bits: int, m: int) -> None:
    device, settings = torch.device("cuda"), (bits, 128, k, n)
    _, tiled = random_weight(*settings, device)
    x = torch.randn(m, k, device=device).half()
    assert_as_good_as_plain(multiply(x, tiled, settings), x, exact_weight(tiled, settings))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2048, 4096])
def test_one_row_of_small_groups(n: int) -> None:
    device, settings = torch.device("cuda"), (4, 32, 4096, n)
    _, tiled = random_weight(*settings, device)
    x = torch.randn(1, 4096, device=device).half()
    assert_as_good_as_plain(multiply(x, tiled, settings), x, exact_weight(tiled, settings))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "m"), [(14336, 1), (8192, 2), (4096, 4), (14336, 4), (4096, 12)])
@pytest.mark.parametrize("group_size", [32, 128])
def test_inputs_in_any_order(group_size: int, k: int, m: int) -> None:
    """Few values of x are sorted by every block, more of them before the product."""
    device, settings = torch.device("cuda"), (4, group_size, k, 1088)
    _, tiled = random_weight(*settings, device, act_order=True)
    x = torch.randn(m, k, device=device).half()
    assert_as_good_as_plain(multiply(x, tiled, settings), x, exact_weight(tiled, settings))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
def test_captured_products_depend_on_each_other(m: int) -> None:
    """A chain in one graph, where each kernel may start before the one in front has ended."""
    device, size = torch.device("cuda"), 1024
    settings = 4, 128, size, size
    weights = [random_weight(*settings, device, act_order=i % 2 == 1)[1] for i in range(6)]
    static = torch.randn(m, size, device=device).half()

    def chain(x: Tensor) -> Tensor:
        for i, tiled in enumerate(weights):
            x = multiply(x, tiled, settings)
            x = x / x.norm() * size**0.5 if i % 3 == 2 else x * 0.1
        return x

    expected = chain(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(static)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    device, settings = torch.device("cuda"), (4, 128, 2048, 2048)
    pairs = []
    for _ in range(2):
        _, tiled = random_weight(*settings, device, act_order=True)
        x = torch.randn(4, 2048, device=device).half()
        pairs.append((x, tiled, multiply(x, tiled, settings)))
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream, (x, tiled, _) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                results.append(multiply(x, tiled, settings))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, pairs[i % 2][2])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 40, 200])
def test_a_weight_of_more_than_two_billion_bytes(m: int) -> None:
    device, k, n = torch.device("cuda"), 65536, 69632
    tiles = torch.randint(0, 2**31 - 1, (n // 64, k // 64, 512), dtype=torch.int32, device=device)
    scales = torch.rand(1, n, device=device).half() + 0.5
    settings = 4, -1, k, n
    x = torch.randn(m, k, device=device).half() / 256
    y = OPS.q_matmul(x, tiles, scales, None, None, None, *settings)
    last = TileTensors(tiles[-1:], scales[:, -64:], None, None)
    assert_as_good_as_plain(y[:, -64:], x, exact_weight(last, (4, -1, k, 64)))


@pytest.mark.gpu
def test_more_than_two_billion_activations() -> None:
    """Half of x and of y lies beyond what 32 bits count."""
    device, m, k, n = torch.device("cuda"), 1 << 20, 2112, 2112
    settings = 4, 64, k, n
    _, tiled = random_weight(*settings, device)
    x = torch.randn(64, k, device=device).half().repeat(m // 64, 1)
    y = multiply(x, tiled, settings)
    assert x.numel() > 2**31
    assert y.numel() > 2**31
    assert_as_good_as_plain(y[-64:], x[-64:], exact_weight(tiled, settings))
    # Blocks share some results: their sums are added in another order, and rounded once more.
    allowed = y[-64:].abs() / 1024 + 1e-4
    for rows in y.view(-1, 64, n).split(1024):
        assert ((rows - y[-64:]).abs() <= allowed).all()
