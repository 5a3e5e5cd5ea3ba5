"""Seconds to quantize a model of Llama-2-7B's shapes, with random weights: per block and in all.

The time of a block is what the whole model takes longer than four of its blocks, by the number of
the others, so that capture and the first use of kernels do not count.  llm-compressor is measured
in the same run where it is installed, with four and two blocks.

With ``--ranks-only`` only the codes and times of four and eight blocks are taken, once alone and
once under ``torchrun --nproc-per-node 2 benchmarks/end_to_end.py --ranks-only --codes FILE``, which
compares its codes with those in the file that the first run has left.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import peers
import torch
import torch.distributed as dist
from measure import save, table
from transformers import LlamaConfig, LlamaForCausalLM

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples
from auto_gptq.kernels import native
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.pipeline import careful
from auto_gptq.pipeline import quantize as pipeline
from auto_gptq.pipeline.ranks import Ranks
from auto_gptq.quantization import solver
from auto_gptq.quantization.hessian import Hessian

BLOCKS_OF_7B = 32
ANCHORS = [("llm-compressor 0.14.0.1", 2.57), ("GPTQModel 7.3.4", 15.2)]  # anchors/h100.json
FEW = 4  # blocks
VARIANTS: dict[str, dict[str, Any]] = {
    "compatible": {"name": "compatible"},
    "default": {"name": "default"},
    "act-order, static groups": {"name": "default", "signed_scales": False, "correction": 0.0},
    "groups in order, min-max": {"name": "compatible", "desc_act": False},
}
# Phase → where its work is done; a phase inside another counts for itself alone.
PHASES = {
    "Hessians": (Hessian, "add"),
    "factorization": (solver, "factorize"),
    "scales and columns": (careful, "solve"),
    "packing": (pipeline, "quantized_from"),
    "before the blocks": (pipeline, "capture"),
    "sums over ranks": (dist, "all_reduce"),
    "codes from ranks": (dist, "all_gather_into_tensor"),
    "agreeing": (Ranks, "all"),
}


def model(blocks: int, options: argparse.Namespace, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=options.hidden // 128,
        vocab_size=32000,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.float16).eval()


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(built: Any, rows: torch.Tensor, settings: dict[str, Any]) -> float:
    """Give the seconds of quantizing; the packed layers are left in the model."""
    config = BaseQuantizeConfig.preset(**settings)
    wrapper = BaseGPTQForCausalLM(built, False, config)
    settle()
    started = time.perf_counter()
    wrapper.quantize(as_examples(rows), show_progress=False)
    settle()
    return time.perf_counter() - started


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Sum the seconds of each phase, waiting for the device before and after each."""
    spent: dict[str, float] = defaultdict(float)
    inner: list[float] = [0.0]

    def timed(phase: str, work: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            settle()
            started = time.perf_counter()
            inner.append(0.0)
            try:
                return work(*args, **kwargs)
            finally:
                settle()
                whole = time.perf_counter() - started
                spent[phase] += whole - inner.pop()
                inner[-1] += whole

        return call

    patches = [
        mock.patch.object(owner, name, timed(phase, getattr(owner, name)))
        for phase, (owner, name) in PHASES.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


def phases(tokens: torch.Tensor, options: argparse.Namespace, device: str) -> dict[str, float]:
    """Give the seconds of each phase for one block, from four; "forward" is the rest."""
    built = model(FEW, options, device)
    with timed_phases() as spent:
        whole = seconds(built, tokens, VARIANTS["act-order, static groups"])
    once = spent.pop("before the blocks")
    per_block = {phase: value / FEW for phase, value in spent.items()}
    per_block["forward and the rest"] = (whole - once) / FEW - sum(per_block.values())
    return per_block | {"before the blocks, once": once}


def measure(settings: dict[str, Any], tokens: torch.Tensor, options: Any, device: str) -> Any:
    """Give the row of one variant."""
    seconds(model(1, options, device), tokens[:8], settings)  # warm up
    few = seconds(model(FEW, options, device), tokens, settings)
    built = model(options.blocks, options, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(built, tokens, settings)
    return {
        f"{FEW} blocks, s": few,
        "per block, s": (whole - few) / (options.blocks - FEW),
        f"{options.blocks} blocks, s": whole,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
    }


def measure_peer(tokens: torch.Tensor, options: Any, device: str) -> Any:
    peers.quantize(model(1, options, device), tokens[:8])  # warm up
    short = peers.quantize(model(2, options, device), tokens)
    few = peers.quantize(model(FEW, options, device), tokens)
    per_block = (few - short) / (FEW - 2)
    return {
        f"{FEW} blocks, s": few,
        "per block, s": per_block,
        f"{options.blocks} blocks, s": few + (options.blocks - FEW) * per_block,
        "peak GB": 0.0,
    }


def codes(built: Any) -> dict[str, torch.Tensor]:
    """Give the packed codes of all layers, on the CPU."""
    layers = {n: m for n, m in built.named_modules() if isinstance(m, QuantLinear)}
    return {name: layer.state_dict()["qweight"].cpu() for name, layer in layers.items()}


def same_share(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Give per layer the share of 4-bit codes that are the same."""
    shares = {}
    for name, words in one.items():
        differing = (words ^ other[name]).view(torch.uint8)
        unequal = ((differing & 15) != 0).sum() + ((differing >> 4) != 0).sum()
        shares[name] = 1 - float(unequal) / (2 * differing.numel())
    return shares


def measure_ranks(tokens: torch.Tensor, options: argparse.Namespace) -> None:
    """Measure as many GPUs as there are ranks, and compare with the codes of one."""
    ranks = Ranks.current()
    device = f"cuda:{ranks.rank}" if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    settings = VARIANTS["act-order, static groups"]
    seconds(model(1, options, device), tokens[: 8 * ranks.count], settings)
    four = model(4, options, device)
    short = seconds(four, tokens, settings)
    long = seconds(model(8, options, device), tokens, settings)
    row: dict[str, Any] = {
        "ranks": ranks.count,
        "4 blocks, s": short,
        "8 blocks, s": long,
        "per block, s": (long - short) / 4,
    }
    found = codes(four)
    row |= phases(tokens, options, device)
    if ranks.count == 1:
        torch.save((row, found), options.codes)
    elif ranks.is_first:
        alone, wanted = torch.load(options.codes)
        shares = same_share(wanted, found)
        row["codes as with one"] = sum(shares.values()) / len(shares)
        row["fewest in a layer"] = min(shares.values())
        row["times as fast"] = alone["per block, s"] / row["per block, s"]
        rows = [alone | dict.fromkeys(row.keys() - alone.keys(), 1.0), row]
        print(table([{key: r[key] for key in row} for r in rows]))
        print(shares)
        print(save(f"end-to-end-ranks-{ranks.count}", {"rows": rows}, options.results))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=128)
    arguments.add_argument("--length", type=int, default=2048)
    arguments.add_argument("--hidden", type=int, default=4096)
    arguments.add_argument("--intermediate", type=int, default=11008)
    arguments.add_argument("--blocks", type=int, default=BLOCKS_OF_7B)
    arguments.add_argument("--results", type=Path)
    arguments.add_argument("--name", default="end-to-end", help="of the file with the results")
    arguments.add_argument("--variants", nargs="*", choices=VARIANTS)
    arguments.add_argument("--ranks-only", action="store_true")
    arguments.add_argument("--codes", type=Path, default=Path("codes-of-one.pt"))
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(native.reason(), flush=True)
    tokens = torch.randint(0, 32000, (options.rows, options.length))
    if options.ranks_only:
        measure_ranks(tokens, options)
        return
    rows: list[dict[str, Any]] = []
    for name in options.variants or VARIANTS:
        settings = VARIANTS[name]
        rows.append({"variant": name} | measure(settings, tokens, options, device))
        print(rows[-1], flush=True)
    of_block = phases(tokens, options, device)
    print(of_block, flush=True)
    content = {
        "settings": {
            "tokens": list(tokens.shape),
            "shapes": [options.hidden, options.intermediate],
            "true_sequential": True,
        },
        "rows": rows,
        "seconds of a block by phase": of_block,
    }
    print(save(f"{options.name}-{device}", content, options.results), flush=True)
    if peers.installed():
        name = f"{peers.NAME} ({options.blocks} blocks extrapolated)"
        rows.append({"variant": name} | measure_peer(tokens, options, device))
        save(f"{options.name}-{device}", content, options.results)
    print(table(rows))
    for name, per_block in ANCHORS:
        print(f"{name}: {per_block} s per block on an H100, 128 x 2048 tokens (anchors)")


if __name__ == "__main__":
    main()
