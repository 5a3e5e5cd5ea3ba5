"""Seconds to quantize a model of Llama-2-7B's shapes, with random weights: per block and in all.

The time of a block is the difference between a model of four and one of two blocks, halved, so that
loading, capture and the first use of kernels do not count; a whole model has 32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from transformers import LlamaConfig, LlamaForCausalLM

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples
from auto_gptq.kernels import native
from auto_gptq.modeling import BaseGPTQForCausalLM

BLOCKS_OF_7B = 32
# (peak GB are those of the longer model)
PEERS = [("llm-compressor 0.14.0.1", 2.57), ("GPTQModel 7.3.4", 15.2)]  # anchors/h100.json


def model(blocks: int, hidden: int, intermediate: int, device: str) -> Any:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        vocab_size=32000,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.float16).eval()


def seconds(built: Any, rows: torch.Tensor, settings: dict[str, Any]) -> float:
    wrapper = BaseGPTQForCausalLM(built, False, BaseQuantizeConfig.preset(**settings))
    started = time.perf_counter()
    wrapper.quantize(as_examples(rows), show_progress=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=128)
    arguments.add_argument("--length", type=int, default=2048)
    arguments.add_argument("--hidden", type=int, default=4096)
    arguments.add_argument("--intermediate", type=int, default=11008)
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(native.reason(), flush=True)
    tokens = torch.randint(0, 32000, (options.rows, options.length))
    shapes = (options.hidden, options.intermediate, device)
    rows: list[dict[str, Any]] = []
    for name, settings in {
        "compatible": {"name": "compatible"},
        "default": {"name": "default"},
        "groups in order, min-max": {"name": "compatible", "desc_act": False},
    }.items():
        seconds(model(1, *shapes), tokens[:8], settings)  # warm up
        short = seconds(model(2, *shapes), tokens, settings)
        long = seconds(model(4, *shapes), tokens, settings)
        per_block = (long - short) / 2
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        rows.append(
            {
                "variant": name,
                "2 blocks, s": short,
                "4 blocks, s": long,
                "per block, s": per_block,
                "32 blocks, s": short + (BLOCKS_OF_7B - 2) * per_block,
                "peak GB": peak,
            }
        )
        print(rows[-1], flush=True)
    print(table(rows))
    for name, per_block in PEERS:
        print(f"{name}: {per_block} s per block on an H100, 128 x 2048 tokens (anchors)")
    what = {"tokens": list(tokens.shape), "shapes": shapes[:2], "true_sequential": True}
    print(save(f"end-to-end-{device}", {"settings": what, "rows": rows}, options.results))


if __name__ == "__main__":
    main()
