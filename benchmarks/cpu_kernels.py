"""The CPU kernels against torch's own, and SmolLM2 with them against transformers in fp32.

    python benchmarks/cpu_kernels.py products [--avx2]
    python benchmarks/cpu_kernels.py model --folder .demo

``products``: a 4096 x 4096 weight in 4 bits, groups of 128.  *hot* is one weight again and again,
*cold* takes turns among eight, 67 MB, which do not stay in the cache.  Rivals are timed in turn,
round after round, so that all meet the same neighbours on the machine, after as many calls as the
cache takes to forget the rival before; the least and the median of the rounds are kept.  ``--avx2``
holds torch and us to AVX2.

``model``: tokens per second through ``generate``, prefill, and perplexity, for the folders that
``examples/demo.py`` leaves.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_gptq import AutoGPTQForCausalLM
from auto_gptq.calibration.datasets import python_documentation, token_rows
from auto_gptq.evaluation.perplexity import perplexity
from auto_gptq.kernels import native, ops
from auto_gptq.nn_modules.qlinear import QuantLinear

assert ops  # importing it defines the operators

N = K = 4096
GROUP, COPIES, FIRST, REPEATS = 128, 8, 16, 4
SETTINGS = 4, GROUP, K, N


def hold_to_avx2() -> None:
    """Start again, with a library in front of ours that says that AVX2 is the best there is."""
    answer = Path(tempfile.mkdtemp()) / "isa.so"
    code = b"int auto_gptq_cpu_best_isa(void) { return 1; }"  # kAvx2 of csrc/launch.h
    subprocess.run(["cc", "-shared", "-o", answer, "-x", "c", "-"], input=code, check=True)
    held = {"ATEN_CPU_CAPABILITY": "avx2", "LD_PRELOAD": str(answer)}  # torch reads the first once
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | held)


def compete(
    rivals: dict[str, Callable[[], Any]], rounds: int, first: int
) -> dict[str, tuple[float, float]]:
    """Time all in turn; give the least and the median in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for name in [*rivals, *rivals]:  # twice, to warm up
        rivals[name]()
    for _ in range(rounds):
        for name, run in rivals.items():
            for _ in range(first):
                run()
            started = time.perf_counter()
            for _ in range(REPEATS):
                run()
            times[name].append((time.perf_counter() - started) * 1e3 / REPEATS)
    return {name: (min(each), statistics.median(each)) for name, each in times.items()}


def rivals_of(m: int) -> dict[str, Callable[[], Any]]:
    op = torch.ops.auto_gptq
    shape = (COPIES, N // 64, K // 64, 512)
    tiles = torch.randint(-(2**31), 2**31, shape).to(torch.int32).unbind()
    scales = torch.rand(K // GROUP, N).half() * 0.01
    packed = [words.view(torch.uint8).view(N, K // 2) for words in tiles]
    dense = [torch.randn(N, K), torch.randn(N, K)]
    x = torch.randn(m, K)
    half, grids = x.bfloat16(), torch.randn(K // GROUP, N, 2).bfloat16()
    layer = QuantLinear(4, GROUP, K, N, bias=False)
    layer.qweight.random_(-(2**31), 2**31 - 1)
    turns = [itertools.cycle(each) for each in (tiles, packed, dense)]
    rivals: dict[str, Callable[[], Any]] = {}
    for name, each in (("ours", op.q_matmul), ("ours int8", op.q_matmul_int8)):
        rivals[f"{name}, hot"] = lambda each=each: each(
            x, tiles[0], scales, None, None, None, *SETTINGS
        )
        rivals[f"{name}, cold"] = lambda each=each: each(
            x, next(turns[0]), scales, None, None, None, *SETTINGS
        )
    rivals["ours fp32, hot"] = lambda: layer(x)
    int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
    rivals["torch int4, hot"] = lambda: int4(half, packed[0], GROUP, grids)
    rivals["torch int4, cold"] = lambda: int4(half, next(turns[1]), GROUP, grids)
    rivals["torch fp32"] = lambda: torch.nn.functional.linear(x, next(turns[2]))
    return rivals


def products(options: argparse.Namespace) -> None:
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for m in options.rows:
            found = compete(rivals_of(m), max(options.rounds // m, 5), FIRST // m + 1)
            for name, (least, median) in found.items():
                rows.append(
                    {"M": m, "threads": threads, "what": name, "least ms": least, "ms": median}
                )
            print(table(rows[-len(found) :]), flush=True)
    name = "cpu-products-avx2" if options.avx2 else "cpu-products"
    capability = torch.backends.cpu.get_cpu_capability()
    content = {"capability of torch": capability, "load": os.getloadavg(), "rows": rows}
    print(save(name, content, options.results))


def model(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    full, packed = options.folder / "smollm2-fp16", options.folder / "smollm2-4bit-128g"
    tokenizer = AutoTokenizer.from_pretrained(full)
    held_out = token_rows(python_documentation(), tokenizer)[128 : 128 + options.evaluation]
    original = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    quantized = AutoGPTQForCausalLM.from_quantized(packed, device="cpu")
    layers = [m for m in quantized.model.modules() if isinstance(m, QuantLinear)]
    prompt = tokenizer("The three most important things about Python are", return_tensors="pt")
    many = torch.as_tensor(held_out[0])[None]

    def switch(kind: str) -> Any:
        for layer in layers:
            layer.int8_activations = kind == "int8"
            layer.restore() if kind == "fp32" else layer.prepare()
        return original if kind == "transformers" else quantized.model

    speeds: dict[str, list[tuple[float, float]]] = {}
    kinds = ("transformers", "default", "int8", "fp32")
    for _ in range(options.rounds):
        for kind in kinds:
            running = switch(kind)
            with torch.inference_mode():
                running(many[:, :64])
                started = time.perf_counter()
                running(many)
                prefill = many.shape[1] / (time.perf_counter() - started)
            started = time.perf_counter()
            running.generate(
                **prompt,
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
            )
            decode = options.tokens / (time.perf_counter() - started)
            speeds.setdefault(kind, []).append((decode, prefill))
            print(kind, f"{decode:.1f} {prefill:.0f}", flush=True)
    rows = []
    for kind in kinds:
        decode, prefill = (statistics.median(each) for each in zip(*speeds[kind], strict=True))
        row = {"kind": kind, "tokens/s": decode, "prefill tokens/s": prefill}
        rows.append(row | {"best tokens/s": max(each for each, _ in speeds[kind])})
        if options.evaluation:
            rows[-1]["perplexity"] = f"{perplexity(switch(kind), held_out):.4f}"
        print(rows[-1], flush=True)
    print(table(rows))
    name = f"cpu-model-{options.threads}-threads"
    print(
        save(
            name,
            {"model": "SmolLM2-135M-Instruct", "load": os.getloadavg(), "rows": rows},
            options.results,
        )
    )


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("what", choices=("products", "model"))
    arguments.add_argument("--avx2", action="store_true", help="no more than that")
    arguments.add_argument("--folder", type=Path, default=Path(".demo"))
    arguments.add_argument("--rounds", type=int, default=60)
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128], help="of x")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--evaluation", type=int, default=8, help="rows of 512 tokens")
    arguments.add_argument("--results", type=Path, help="folder for the JSON file")
    options = arguments.parse_args()
    if options.avx2 and "ATEN_CPU_CAPABILITY" not in os.environ:
        hold_to_avx2()
    with torch.inference_mode():
        products(options) if options.what == "products" else model(options)


if __name__ == "__main__":
    native.load()
    main()
