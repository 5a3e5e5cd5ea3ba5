"""Products of dozens to thousands of rows of x: other kernels, and cuBLAS on panels of W."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.test_q_matmul import assert_as_good_as_plain, exact_weight, multiply
from tests.kernels.test_tile_ops import BITS, random_weight

SHAPES = [(32, 32), (96, 64), (576, 1536), (1536, 576), (2368, 1088)]  # K, N


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padded_shapes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """K and N that end inside a tile or a block, and rows that end inside one."""
    settings = 4, 32, *shape
    _, tiled = random_weight(*settings, device)
    weight = exact_weight(tiled, settings)
    for m in (18,) if device.type == "cpu" else (17, 32, 63, 65, 129, 192, 200, 257, 520, 1100):
        x = torch.randn(m, shape[0], device=device).to(dtype)
        assert_as_good_as_plain(multiply(x, tiled, settings), x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_sums_of_many_inputs(bits: int, group_size: int) -> None:
    """K so long that several blocks share the inputs; always summed in the same order."""
    device, k, n = torch.device("cuda"), 8192, 320
    settings = bits, group_size, k, n
    _, tiled = random_weight(*settings, device, act_order=group_size == 128)
    weight = exact_weight(tiled, settings)
    bias = torch.randn(n, device=device).half()
    for m in (24, 64, 128, 300, 700):
        x = torch.randn(m, k, device=device).half()
        y = multiply(x, tiled, settings, bias)
        assert_as_good_as_plain(y, x, weight, bias)
        for _ in range(5):
            assert torch.equal(multiply(x, tiled, settings, bias), y)


@pytest.mark.gpu
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_scales_of_any_type_go_with_many_rows(
    group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    for bits in BITS:
        settings = bits, group_size, 704, 352
        _, tiled = random_weight(*settings, device, symmetric=symmetric, dtype=scale_dtype)
        weight = exact_weight(tiled, settings)
        for dtype in (torch.float16, torch.bfloat16):
            for m in (20, 64, 100, 150):
                x = torch.randn(m, 704, device=device).to(dtype)
                assert_as_good_as_plain(multiply(x, tiled, settings), x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "most_m"), [(5152, 2050), (14336, 1030), (131072, 40)])
def test_many_rows_of_inputs_in_any_order(k: int, most_m: int) -> None:
    """Blocks sort parts of a row, a row, or four; the longest rows fit no shared memory."""
    device = torch.device("cuda")
    settings = 4, 32, k, 96
    _, tiled = random_weight(*settings, device, act_order=True)
    weight = exact_weight(tiled, settings)
    for m in (17, 40, 130, 257, 1030, 2050):
        if m <= most_m:
            x = torch.randn(m, k, device=device).half()
            assert_as_good_as_plain(multiply(x, tiled, settings), x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_of_many_rows(seed: int) -> None:
    """Results that blocks have alone, or share in odd ways: no two draws deal them out alike."""
    device, draw = torch.device("cuda"), random.Random(seed)
    k, n = 32 * draw.randint(4, 400), 32 * draw.choice([draw.randint(1, 64), draw.randint(64, 700)])
    settings = draw.choice(BITS), draw.choice([16, 32, 64, 128, -1]), k, n
    how = {"symmetric": draw.random() < 0.5, "act_order": draw.random() < 0.3}
    _, tiled = random_weight(*settings, device, **how)
    weight = exact_weight(tiled, settings)
    dtype = draw.choice([torch.float16, torch.bfloat16])
    for m in (draw.randint(*span) for span in ((17, 32), (33, 64), (65, 255), (256, 3000))):
        x = torch.randn(m, 2 * k, device=device).to(dtype)[:, ::2]  # not contiguous
        y = multiply(x, tiled, settings)
        assert_as_good_as_plain(y, x, weight)
        assert torch.equal(multiply(x, tiled, settings), y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thousands_of_rows(dtype: torch.dtype) -> None:
    """Where no kernel takes x, as in fp32, the dense weight exists 32 MiB at a time: thrice."""
    device, k, n = torch.device("cuda"), 4096, 4992
    for bits, act_order in ((4, False), (4, True), (3, True)):
        settings = bits, 64, k, n
        _, tiled = random_weight(*settings, device, act_order=act_order)
        x = torch.randn(2, 1030, k, device=device, dtype=dtype)
        y = multiply(x, tiled, settings)
        assert y.is_contiguous()
        assert_as_good_as_plain(y, x, exact_weight(tiled, settings))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [40, 200, 600])
def test_captured_products_of_many_rows(m: int) -> None:
    """Each kernel may start before the one in front, which arranges its x, has ended."""
    device, size = torch.device("cuda"), 1024
    settings = 4, 128, size, size
    weights = [random_weight(*settings, device, act_order=i % 2 == 1)[1] for i in range(4)]
    static = torch.randn(m, size, device=device).half()

    def chain(x: torch.Tensor) -> torch.Tensor:
        for tiled in weights:
            x = multiply(x, tiled, settings) * 0.1
        return multiply(multiply(x[:8], weights[0], settings), weights[1], settings)

    expected = chain(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(static)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [64, 150, 800])
def test_two_streams_of_many_rows(m: int) -> None:
    device, settings = torch.device("cuda"), (4, 128, 4096, 1024)
    pairs = []
    for _ in range(2):
        _, tiled = random_weight(*settings, device, act_order=True)
        x = torch.randn(m, 4096, device=device).half()
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
