"""Microseconds per product x W^T on this GPU, against fp16 cuBLAS and Humming in the same run.

As in a decoding loop: CUDA graphs, the kernels' own launches (ours may start before the one in
front has ended), and weights that change from call to call, so that none is in cache.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import auto_gptq.kernels.ops  # noqa: F401 (defines the operators)
from auto_gptq.kernels import native

SHAPES = [  # K, N
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (4096, 14336),
    (14336, 4096),
    (8192, 8192),
    (4096, 28672),
    (8192, 28672),
]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
COLD = 300e6  # bytes of weights to go through before the first one comes again: 6 times H100's L2

Product = Callable[[int], Tensor]  # by the weight of this number


@dataclass(frozen=True)
class Kind:
    """A way to be quantized."""

    name: str
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("4 bits"),
        Kind("3 bits", bits=3),
        Kind("2 bits", bits=2),
        Kind("8 bits", bits=8),
        Kind("4 bits, asymmetric", symmetric=False),
        Kind("4 bits, act-order", act_order=True),
        Kind("4 bits, groups of 32", group_size=32),
        Kind("4 bits, one group", group_size=-1),
    )
}


def copies(bytes_of_one: float) -> int:
    """Give how many weights make none of them be found in cache."""
    return max(2, int(COLD / bytes_of_one) + 1)


def cublas(x: Tensor, k: int, n: int) -> tuple[Product, int]:
    """Multiply by dense fp16 weights."""
    count = copies(2 * k * n)
    weights = torch.randn(count, n, k, device=x.device, dtype=x.dtype)
    return lambda i: x @ weights[i].t(), count


def ours(x: Tensor, k: int, n: int, kind: Kind) -> tuple[Product, int]:
    """Multiply by random tiles; which numbers they hold costs no time."""
    count = copies(k * n * kind.bits / 8)
    groups = 1 if kind.group_size == -1 else k // kind.group_size
    on = {"device": x.device}
    shape = -(-n // 64), -(-k // 64), 128 * kind.bits
    weights = []
    for _ in range(count):
        tiles = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, **on)
        scales = torch.rand(groups, shape[0] * 64, **on).to(x.dtype) * 0.01
        zeros = None
        if not kind.symmetric:
            zeros = torch.randint(2**kind.bits, scales.shape, dtype=torch.uint8, **on)
        perm = torch.randperm(k, dtype=torch.int32, **on) if kind.act_order else None
        weights.append((tiles, scales, zeros, perm))
    settings = kind.bits, kind.group_size, k, n
    return lambda i: torch.ops.auto_gptq.q_matmul(x, *weights[i], None, *settings), count


@functools.cache  # to quantize them takes longer than to measure
def humming_layers(k: int, n: int, kind: Kind) -> list[Any]:
    """Give Humming's layers of random weights; those for any number of rows are the same."""
    from humming.layer import HummingLayer

    settings = {"dtype": f"int{kind.bits}", "group_size": max(kind.group_size, 0)}
    layers = []
    for _ in range(min(copies(k * n * kind.bits / 8), 16)):
        layer = HummingLayer(n, k, dict(settings), torch_dtype=torch.float16).cuda()
        layer.load_from_unquantized(torch.randn(n, k, device="cuda", dtype=torch.float16))
        layer.transform()
        layers.append(layer)
    return layers


def humming(x: Tensor, k: int, n: int, kind: Kind) -> tuple[Product, int]:
    """Multiply by Humming's layer with its own choice of kernel, compiled when first used."""
    layers = humming_layers(k, n, kind)
    return lambda i: layers[i](x), len(layers)


def capture(product: Product, count: int, stream: torch.cuda.Stream) -> tuple[Any, int]:
    """Give a graph of calls, and how many."""
    inner = max(count, 24)
    product(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(inner):
            product(i % count)
    return graph, inner


def microseconds(products: list[tuple[Product, int]], rounds: int = 9) -> list[list[float]]:
    """Give the times of one call of each, round by round.

    They take turns, since a card at its power limit changes its clock from second to second: only
    times of the same round compare.
    """
    stream = torch.cuda.Stream()
    times: list[list[float]] = [[] for _ in products]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graphs = [capture(product, count, stream) for product, count in products]
        for _ in range(rounds):
            for (graph, inner), taken in zip(graphs, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                graph.replay()
                end.record(stream)
                torch.cuda.synchronize()
                taken.append(1000 * start.elapsed_time(end) / inner)
    return times


def times_faster(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def measure(k: int, n: int, m: int, kinds: list[Kind], peers: bool) -> Iterator[dict[str, Any]]:
    """Give a row of the table for each kind."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    dense = cublas(x, k, n)
    for kind in kinds:
        products = [dense, ours(x, k, n, kind)]
        if peers and kind.symmetric and not kind.act_order and kind.bits in (4, 8):
            try:
                peer = humming(x, k, n, kind)
                peer[0](0)
                products.append(peer)
            except (RuntimeError, AssertionError, ValueError) as error:
                print(f"Humming refuses {n}x{k}, M = {m}, {kind.name}: {error}", file=sys.stderr)
        base, mine, *other = microseconds(products)
        yield {
            "K": k,
            "N": n,
            "M": m,
            "kind": kind.name,
            "cuBLAS fp16": statistics.median(base),
            "ours": statistics.median(mine),
            "times cuBLAS": times_faster(base, mine),
            "Humming": statistics.median(other[0]) if other else "-",
            "times Humming": times_faster(other[0], mine) if other else "-",
        }
        del products
        torch.cuda.empty_cache()


def has_humming() -> bool:
    try:
        import humming.layer  # noqa: F401
    except ImportError as error:
        print(f"Humming is not compared: {error}")
        return False
    return True


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of M")
    arguments.add_argument("--shapes", nargs="+", metavar="KxN", help="instead of all")
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=["4 bits"])
    arguments.add_argument("--no-peers", action="store_true", help="do not look for Humming")
    arguments.add_argument("--name", default="kernels-cuda", help="of the file with the results")
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    shapes = SHAPES
    if options.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    torch.manual_seed(0)
    print(native.reason())
    peers = not options.no_peers and has_humming()
    kinds = [KINDS[name] for name in options.kinds]
    rows = []
    for m in options.rows:
        for k, n in shapes:
            for row in measure(k, n, m, kinds, peers):
                rows.append(row)
                print(row, flush=True)
            save(options.name, {"unit": "microseconds", "rows": rows}, options.results)
    print(table(rows))


if __name__ == "__main__":
    main()
