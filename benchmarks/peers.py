"""llm-compressor, measured in the same run where it is installed: no other package needs it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

NAME = "llm-compressor"


def installed() -> bool:
    """Tell whether llm-compressor can be imported; say why not."""
    try:
        import llmcompressor
    except ImportError as error:
        print(f"{NAME} is not measured: {error}", flush=True)
        return False
    print(f"{NAME} {llmcompressor.__version__}", flush=True)
    return True


def solver(weight: torch.Tensor, hessian: torch.Tensor, act_order: bool) -> Callable[[], Any]:
    """Give a call of its GPTQ on one matrix, 4 bits, groups of 128, symmetric, min-max."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    settings = QuantizationArgs(
        num_bits=4,
        symmetric=True,
        strategy="group",
        group_size=128,
        actorder="weight" if act_order else None,
    )
    grouped = weight.view(weight.shape[0], -1, 128)
    scale = (grouped.abs().amax(-1) / 7.5)[None]
    zero = torch.zeros_like(scale, dtype=torch.int8)

    def solve() -> Any:
        # It works in its inputs, so that it needs fresh ones; their copies count 1 % of the time.
        batch = weight[None].clone(), hessian[None].clone()
        return quantize_weight(*batch, scale, zero, None, settings)[0][0]

    return solve


class _Processor:
    """Stands for a tokenizer."""

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        """Write nothing."""


def quantize(model: Any, rows: torch.Tensor) -> float:
    """Quantize a model with GPTQ at 4 bits and groups of 128; give the seconds."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows
    ]
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    with tempfile.TemporaryDirectory() as folder:  # it wants to read the configuration from a file
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        started = time.perf_counter()
        oneshot(
            model=model,
            processor=_Processor(),  # of which nothing is asked: the rows are ids
            dataset=torch.utils.data.DataLoader(batches, batch_size=None),
            recipe=recipe,
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            batch_size=1,
            pipeline="sequential",
        )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
