"""Microseconds of one block's experts: in 4 bits, groups of 128, and as transformers has them.

    python benchmarks/experts.py                        # on a GPU: Mixtral's and Qwen3-MoE's shapes
    python benchmarks/experts.py --shapes small --threads 2 --device cpu

*grouped* is this package's call of all experts, *one by one* its call of each linear; the others
are transformers' implementations on dense weights.  Every call is routed anew, evenly on average,
so that no call finds its experts' weights in cache.  The time is that from call to call, the host's
work included; *in a graph* it is that of CUDA graphs, which cannot hold what asks the GPU for the
number of rows.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from auto_gptq.kernels import native
from auto_gptq.nn_modules.experts import unfuse
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import prepare
from auto_gptq.nn_modules.unfused import UnfusedExperts

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The experts of a block."""

    model_type: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def module(self, implementation: str) -> Any:
        """Give transformers' module of these experts, on the device that is set."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=64,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            moe_intermediate_size=self.intermediate,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=self.experts,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return next(m for n, m in model.named_modules() if n.endswith("experts")).eval()


SHAPES = {
    "Mixtral": Shape("mixtral", 8, 2, 4096, 14336),
    "Qwen3-MoE": Shape("qwen3_moe", 128, 8, 2048, 768),
    "small": Shape("qwen3_moe", 32, 8, 2048, 768),
    "tiny": Shape("mixtral", 4, 2, 128, 256),
}


def packed(shape: Shape, device: torch.device) -> Any:
    """Give packed experts of random numbers."""
    module = shape.module("eager")
    unfuse(module)
    for expert in module.experts():
        for name, linear in list(expert.named_children()):
            layer = QuantLinear(4, 128, linear.in_features, linear.out_features, bias=False)
            layer.to(device)
            layer.qweight.random_(-(2**31), 2**31 - 1)
            layer.qzeros.fill_(0x77777777)
            layer.scales.uniform_(0.002, 0.004)
            setattr(expert, name, layer)
    prepare(module)
    print(module.explain())
    return module


def dense(shape: Shape, implementation: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Give transformers' experts of random numbers."""
    module = shape.module(implementation).to(dtype).to_empty(device=device)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(0, 0.02)
    return module


def one_by_one(module: Any) -> Call:
    """Call each linear of packed experts."""

    def call(*arguments: Tensor) -> Tensor:
        grouped = UnfusedExperts.grouped
        UnfusedExperts.grouped = lambda _self: None  # type: ignore[method-assign]
        try:
            result: Tensor = module(*arguments)
        finally:
            UnfusedExperts.grouped = grouped  # type: ignore[method-assign]
        return result

    return call


def rivals(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Give one after another, so that not all weights are in memory at once."""
    module = packed(shape, device)
    yield "grouped", module
    yield "one by one", one_by_one(module)
    del module
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        gc.collect()
        yield f"transformers {implementation}", dense(shape, implementation, device, dtype)


Routing = tuple[Tensor, Tensor, Tensor]


def routings(
    shape: Shape, tokens: int, count: int, device: torch.device, dtype: torch.dtype
) -> list[Routing]:
    made = []
    for _ in range(count):
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        weights, index = torch.rand(tokens, shape.experts, device=device).topk(shape.top_k)
        made.append((x, index, (weights / weights.sum(-1, keepdim=True)).to(dtype)))
    return made


def called(call: Call, calls: list[Routing], seconds: float) -> float:
    """Give the median over rounds through all calls."""

    def wait() -> None:
        if calls[0][0].is_cuda:
            torch.cuda.synchronize()

    until = time.perf_counter() + seconds / 2
    while time.perf_counter() < until:  # to warm up
        call(*calls[0])
        wait()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        wait()
        started = time.perf_counter()
        for each in calls:
            call(*each)
        wait()
        times.append((time.perf_counter() - started) * 1e6 / len(calls))
    return statistics.median(times)


def in_a_graph(call: Call, calls: list[Routing]) -> float | str:
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(*calls[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for each in calls:
                    call(*each)
        except RuntimeError as error:
            print(f"no graph: {error}")
            return "-"
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize()
            times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


CAPTURABLE = ("grouped", "transformers grouped_mm", "transformers batched_mm")
MOST_COPIED = 16  # rows: batched_mm copies an expert's weights for each


@torch.inference_mode()
def measure(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    # grouped_mm multiplies in one kernel in bfloat16 only.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: dict[int, dict[str, Any]] = {tokens: {} for tokens in options.tokens}
    for name, call in rivals(shape, device, dtype):
        for tokens, row in rows.items():
            if name.endswith("batched_mm") and tokens * shape.top_k > MOST_COPIED:
                continue
            calls = routings(shape, tokens, 16 if tokens < 64 else 6, device, dtype)
            row[name] = called(call, calls, options.seconds)
            if device.type == "cuda" and name in CAPTURABLE:
                row[f"{name}, in a graph"] = in_a_graph(call, calls)
            print(f"{tokens} tokens, {name}: {row[name]:.1f}", flush=True)
    return [{"tokens": tokens, **row} for tokens, row in rows.items()]


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Mixtral", "Qwen3-MoE"])
    arguments.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--seconds", type=float, default=0.2, help="of calls per figure")
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(native.reason())
    rows: list[dict[str, Any]] = []
    for name in options.shapes:
        found = [{"experts": name, **row} for row in measure(SHAPES[name], options)]
        rows += found
        kind = "cuda" if options.device.startswith("cuda") else "cpu"
        save(f"experts-{kind}", {"unit": "microseconds", "rows": rows}, options.results)
        for row in found:
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()})
    heads = [head for row in rows for head in row]
    print(table([{head: row.get(head, "-") for head in dict.fromkeys(heads)} for row in rows]))


if __name__ == "__main__":
    main()
