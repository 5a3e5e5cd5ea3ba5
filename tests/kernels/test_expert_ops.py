"""The operators of a mixture of experts against float64, expert by expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from auto_gptq.formats.gptq import group_count
from auto_gptq.formats.tiles import TileTensors
from auto_gptq.kernels import expert_ops, native
from tests.kernels.test_q_matmul import exact_weight
from tests.kernels.test_tile_ops import BITS, OPS, operands

Settings = tuple[int, int, int, int]  # bits, group_size, K, N


def random_experts(
    count: int,
    settings: Settings,
    device: torch.device,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> list[TileTensors]:
    """Give weights of any bits, padding included: kernels must not read what that says."""
    native.load()
    bits, group_size, k, n = settings
    rows, columns, groups = -(-n // 64), -(-k // 64), group_count(k, group_size)
    made = []
    for _ in range(count):
        words = (rows, columns, 128 * bits)
        tiles = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=device)
        scales = (torch.randn(groups, rows * 64, device=device) * 0.02).to(dtype)
        zeros = torch.randint(2**bits, scales.shape, dtype=torch.uint8, device=device)
        perm = torch.randperm(k, dtype=torch.int32, device=device)
        made.append(
            TileTensors(tiles, scales, None if symmetric else zeros, perm if act_order else None)
        )
    return made


def stacked(experts: list[TileTensors]) -> list[Tensor | None]:
    columns = zip(*(operands(expert) for expert in experts), strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]  # type: ignore[arg-type]


def ends_of(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32)


def weights_of(experts: list[TileTensors], sizes: list[int], settings: Settings) -> list[Tensor]:
    """Give each weight in float64, of those that have rows."""
    return [
        exact_weight(expert, settings) if size else torch.empty(0)
        for expert, size in zip(experts, sizes, strict=True)
    ]


def expected(
    rows: Tensor,  # [S, K], sorted by expert
    sizes: list[int],
    weights: list[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Give y computed in a dtype from weights rounded to it."""
    n = next(len(weight) for weight, size in zip(weights, sizes, strict=True) if size)
    y = torch.zeros(len(rows), n, dtype=dtype, device=rows.device)
    at = 0
    for i, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        own = None if bias is None else bias[i].to(dtype)
        if size:
            y[at : at + size] = F.linear(rows[at : at + size].to(dtype), weight.to(dtype), own)
        at += size
    return y


def assert_as_good_as_plain(
    y: Tensor, rows: Tensor, sizes: list[int], weights: list[Tensor], bias: Tensor | None = None
) -> None:
    """Compare root mean square errors with those of products of numbers in the dtype of y."""
    exact = expected(rows, sizes, weights, bias, torch.float64)
    plain = expected(rows, sizes, weights, bias, y.dtype)
    assert y.shape == exact.shape
    error, allowed = (y.double() - exact).norm(), (plain.double() - exact).norm()
    assert error <= 2 * allowed, f"error {error / exact.norm()}, plain {allowed}"


SIZES = {
    "one row each": [1] * 8,
    "some without": [0, 3, 0, 9, 1, 0, 0, 2],
    "one takes all": [0, 0, 0, 0, 0, 70, 0, 0],
    "uneven": [17, 0, 64, 1, 33, 5, 8, 65],
    "many": [130, 40, 0, 70, 129, 64, 63, 1],
}


@pytest.mark.parametrize("group_size", [16, 32, 48, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_every_expert_multiplies_its_rows_as_well_as_a_plain_product(
    bits: int, group_size: int, device: torch.device
) -> None:
    on_cpu = device.type == "cpu"
    act_order = bits % 2 == 1 or group_size == 48
    for k, n in [(288, 96)] if on_cpu else [(864, 416), (1024, 448), (64, 32)]:
        settings = bits, min(group_size, k), k, n
        experts = random_experts(
            8, settings, device, symmetric=group_size == -1, act_order=act_order
        )
        weights = weights_of(experts, [1] * 8, settings)
        for name, sizes in SIZES.items():
            if on_cpu and name == "many":
                continue
            for dtype in (torch.float16,) if on_cpu else (torch.float16, torch.bfloat16):
                bias = torch.randn(8, n, device=device).to(dtype) if act_order else None
                tokens = torch.randn(11, k, device=device).to(dtype)
                rows = torch.randint(11, (sum(sizes) + 3,), dtype=torch.int32, device=device)
                weight = (*stacked(experts), bias, *settings, False)
                y = OPS.q_experts(tokens, rows, ends_of(sizes, device), *weight)
                assert y.dtype == dtype
                own = tokens[rows.long()]
                assert_as_good_as_plain(y, own, sizes, weights, bias)
                again = OPS.q_experts(own, None, ends_of(sizes, device), *weight)
                assert torch.equal(again, y)


def test_128_experts_of_which_few_are_hit(device: torch.device) -> None:
    settings = 4, 128, 256, 128
    experts = random_experts(128, settings, device)
    for count in (0, 1, 8, 300):
        chosen = torch.randint(128, (count,)).bincount(minlength=128).tolist()
        x = torch.randn(count, 256, device=device).half()
        y = OPS.q_experts(
            x, None, ends_of(chosen, device), *stacked(experts), None, *settings, False
        )
        assert y.shape == (count, 128)
        if count:
            assert_as_good_as_plain(y, x, chosen, weights_of(experts, chosen, settings))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_any_type(scale_dtype: torch.dtype, device: torch.device) -> None:
    sizes = [3, 0, 40, 9]
    for group_size in (32, 64):
        settings = 4, group_size, 192, 64
        experts = random_experts(4, settings, device, dtype=scale_dtype)
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(sum(sizes), 192, device=device).to(dtype)
            y = OPS.q_experts(
                x, None, ends_of(sizes, device), *stacked(experts), None, *settings, False
            )
            assert_as_good_as_plain(y, x, sizes, weights_of(experts, sizes, settings))


def test_eight_bits_of_activations_on_a_cpu_cost_less_than_a_hundredth() -> None:
    settings, sizes = (4, 64, 256, 96), [9, 0, 2, 30]
    device = torch.device("cpu")
    experts = random_experts(4, settings, device)
    x = torch.randn(sum(sizes), 256)
    arguments = (x, None, ends_of(sizes, device), *stacked(experts), None, *settings)
    exact = expected(x, sizes, weights_of(experts, sizes, settings), None, torch.float64)
    errors = [
        float((OPS.q_experts(*arguments, int8).double() - exact).norm() / exact.norm())
        for int8 in (False, True)
    ]
    assert 10 * errors[0] < errors[1] < 0.01


@pytest.mark.parametrize("experts", [1, 4, 128, 200])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sorting_is_stable_and_puts_nobodys_rows_last(
    top_k: int, experts: int, device: torch.device
) -> None:
    for tokens in (0, 1, 7, 700):
        # Numbers from E on, and negative ones, are nobody's.
        index = torch.randint(-1, experts + 2, (tokens, top_k), device=device)
        rows, places, offsets = OPS.sort_by_expert(index, experts)
        wanted = expert_ops.sort_by_expert(index.cpu(), experts)
        for found, expected_one in zip((rows, places, offsets), wanted, strict=True):
            assert found.dtype == torch.int32
            assert torch.equal(found.cpu(), expected_one)
        flat = index.flatten()
        owned = int(((flat >= 0) & (flat < experts)).sum())
        assert int(offsets[-1]) == owned
        by_row = flat[places.long().argsort()] if tokens else flat
        assert torch.equal(by_row[:owned].sort().values, by_row[:owned])
        assert torch.equal(rows.long(), places.long().argsort() // top_k)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weighted_sums_are_rounded_once(
    dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> None:
    for tokens, top_k, n in ((1, 8, 96), (33, 2, 2048), (0, 2, 32), (5, 3, 30)):
        y = torch.randn(tokens * top_k, n, device=device).to(dtype)
        places = torch.randperm(tokens * top_k, device=device).to(torch.int32)
        weights = torch.rand(tokens, top_k, device=device).to(weight_dtype)
        found = OPS.combine_experts(y, places, weights)
        rows = y.double()[places.long()].view(tokens, top_k, n)
        exact = (rows * weights.double()[..., None]).sum(1)
        unit = torch.finfo(dtype).eps
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, rtol=unit, atol=1e-6)


@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
def test_opcheck(act_order: bool, device: torch.device) -> None:
    settings = 4, 32, 96, 64
    experts = random_experts(3, settings, device, act_order=act_order)
    x = torch.randn(5, 96, device=device).half()
    index = torch.tensor([[0, 2], [2, 3], [1, 0], [0, 2], [2, 1]], device=device)
    torch.library.opcheck(OPS.sort_by_expert, (index, 3))
    rows, places, offsets = OPS.sort_by_expert(index, 3)
    bias = torch.randn(3, 64, device=device)
    for from_rows in (rows, None):
        ends = offsets if from_rows is not None else offsets.clamp(max=5)
        weight = (*stacked(experts), bias, *settings, False)
        torch.library.opcheck(OPS.q_experts, (x, from_rows, ends, *weight))
    y = torch.randn(10, 64, device=device).half()
    shares = torch.rand(5, 2, device=device, requires_grad=True)
    torch.library.opcheck(OPS.combine_experts, (y.requires_grad_(), places, shares))


def test_what_does_not_fit_is_refused_by_name(device: torch.device) -> None:
    settings = 4, 32, 96, 64
    tiles, scales, zeros, _ = stacked(random_experts(3, settings, device))
    x = torch.randn(4, 96, device=device).half()
    offsets = ends_of([4, 0, 0], device)

    def run(*changed: object) -> Tensor:
        y: Tensor = OPS.q_experts(*changed, zeros, None, None, *settings, False)
        return y

    with pytest.raises(RuntimeError, match=r"offsets is \[3\], but must be \[E \+ 1\] = \[4\]"):
        run(x, None, offsets[:3], tiles, scales)
    with pytest.raises(RuntimeError, match=r"scales is \[2, 3, 64\], .* each of 3 experts"):
        run(x, None, offsets, tiles, scales[:2])  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"x is \[4, 64\], but must be \[T, K\] with K = 96"):
        run(x[:, :64], None, offsets, tiles, scales)
    with pytest.raises(RuntimeError, match="rows is Long, but must be Int"):
        run(x, offsets.long(), offsets, tiles, scales)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"offsets must rise from 0 to at most .* 4"):
            run(x, None, ends_of([4, 1, 0], device), tiles, scales)
        with pytest.raises(RuntimeError, match=r"rows\[1\] is 9, but must be in \[0, 4\)"):
            run(x, torch.tensor([0, 9, 1, 1], dtype=torch.int32), offsets, tiles, scales)
    else:
        with pytest.raises(RuntimeError, match="x is Float, but on a GPU"):
            run(x.float(), None, offsets, tiles, scales)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "n"), [(2048, 1536), (4096, 1024), (768, 2048)])
def test_shapes_of_real_models(k: int, n: int, bits: int) -> None:
    device, settings = torch.device("cuda"), (bits, 128, k, n)
    experts = random_experts(8, settings, device)
    for sizes in (
        [1, 0, 1, 1, 1, 0, 0, 1],
        [8, 9, 3, 16, 0, 1, 2, 30],
        [64, 200, 0, 31, 99, 1, 1, 8],
    ):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(sum(sizes), k, device=device).to(dtype)
            y = OPS.q_experts(
                x, None, ends_of(sizes, device), *stacked(experts), None, *settings, False
            )
            assert_as_good_as_plain(y, x, sizes, weights_of(experts, sizes, settings))


@pytest.mark.gpu
def test_a_captured_graph_follows_another_routing() -> None:
    """Nothing waits for the host: the same graph serves whatever experts are chosen."""
    device, settings = torch.device("cuda"), (4, 64, 256, 256)
    weights = stacked(random_experts(16, settings, device, act_order=True))
    x = torch.randn(6, 256, device=device).half()
    index = torch.randint(16, (6, 4), device=device)
    shares = torch.rand(6, 4, device=device)

    def block() -> Tensor:
        rows, places, offsets = OPS.sort_by_expert(index, 16)
        y = OPS.q_experts(x, rows, offsets, *weights, None, *settings, False)
        y = OPS.q_experts(y * 0.05, None, offsets, *weights, None, *settings, False)
        combined: Tensor = OPS.combine_experts(y, places, shares)
        return combined

    block()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block()
    for _ in range(10):
        index.copy_(torch.randint(17, (6, 4), device=device))
        x.copy_(torch.randn(6, 256, device=device))
        graph.replay()
        assert torch.equal(captured, block())


def test_strides_and_odd_addresses_are_taken(device: torch.device) -> None:
    settings, sizes = (4, 32, 96, 64), [2, 0, 3]
    experts = random_experts(3, settings, device, act_order=True)
    weights = weights_of(experts, sizes, settings)
    storage = torch.randn(5 * 96 + 1, device=device).half()
    for x in (
        storage[1:].view(5, 96),
        torch.randn(96, 5, device=device).half().t(),
        torch.randn(5, 192, device=device).half()[:, ::2],
    ):
        y = OPS.q_experts(
            x, None, ends_of(sizes, device), *stacked(experts), None, *settings, False
        )
        assert_as_good_as_plain(y, x, sizes, weights)
    nothing = OPS.q_experts(
        x[:0], None, ends_of([0, 0, 0], device), *stacked(experts), None, *settings, False
    )
    assert nothing.shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("each", [1, 40])
def test_two_streams_at_once(each: int) -> None:
    device, settings = torch.device("cuda"), (4, 128, 1024, 1024)
    sizes = [each] * 8
    calls = []
    for _ in range(2):
        weights = stacked(random_experts(8, settings, device, act_order=True))
        x = torch.randn(sum(sizes), 1024, device=device).half()
        calls.append((x, None, ends_of(sizes, device), *weights, None, *settings, False))
    expected = [OPS.q_experts(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(OPS.q_experts(*call))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 2])


@pytest.mark.gpu
@pytest.mark.parametrize("each", [1, 40])
def test_experts_of_more_than_two_billion_bytes(each: int) -> None:
    """The last of 136 experts lies beyond what 32 bits count."""
    device, count, k, n = torch.device("cuda"), 136, 4096, 8192
    settings, sizes = (4, -1, k, n), [0] * 135 + [each]
    shape = count, n // 64, k // 64, 512
    tiles = torch.randint(0, 2**31 - 1, shape, dtype=torch.int32, device=device)
    scales = (torch.rand(count, 1, n, device=device) + 0.5).half() * 0.01
    x = torch.randn(each, k, device=device).half()
    ends = ends_of(sizes, device)
    y = OPS.q_experts(x, None, ends, tiles, scales, None, None, None, *settings, False)
    assert tiles.nbytes > 2**31
    last = TileTensors(tiles[-1], scales[-1], None, None)
    assert_as_good_as_plain(y, x, [each], [exact_weight(last, settings)])
