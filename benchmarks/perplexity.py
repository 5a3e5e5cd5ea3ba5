"""Perplexity of SmolLM2-135M, before and after quantizing it in several ways.

The full run (128 x 512 tokens of calibration, 92 x 512 of evaluation) takes minutes on a GPU; on a
CPU try ``--calibration 16 --evaluation 8``.  Text: ``--data`` names a safetensors file with the
token rows `calibration` and `evaluation`; without it the documentation of the running Python is cut
into both.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples, python_documentation, token_rows
from auto_gptq.evaluation.perplexity import perplexity
from auto_gptq.evaluation.smollm2 import unpack_smollm2
from auto_gptq.formats.grid import GridRule
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.surgery import dequantize, find_linears
from auto_gptq.quantization.solver import SolverOptions, round_to_nearest

# What is compared; every row is one quantization.  `autogptq`: the perplexity of AutoGPTQ's own
# solver on the same tokens (../shared/anchors/h100.json), where it was measured.
VARIANTS: list[dict[str, Any]] = [
    {"name": "no act-order, min-max", "desc_act": False, "scale_search": False, "autogptq": 19.33},
    {"name": "act-order, min-max", "desc_act": True, "scale_search": False, "autogptq": 16.17},
    {"name": "no act-order", "desc_act": False, "autogptq": 19.33},
    {"name": "act-order", "desc_act": True, "autogptq": 16.17},
    {"name": "act-order, static groups", "desc_act": True, "static_groups": True},
]


def tokens(options: argparse.Namespace, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if options.data is not None:
        rows = load_file(options.data)
        calibration, evaluation = rows["calibration"].long(), rows["evaluation"].long()
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        all_rows = token_rows(python_documentation(), tokenizer)
        calibration, evaluation = all_rows[:128], all_rows[128:220]
    return calibration[: options.calibration], evaluation[: options.evaluation]


def rounded(model: Any, bits: int, group_size: int) -> Any:
    """Round every linear of the blocks to the nearest code."""
    options = SolverOptions(GridRule(bits), group_size)
    for linear in find_linears(model.model).values():
        nothing = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        found = round_to_nearest(linear.weight.data, nothing, options)
        linear.weight.data.copy_(found.dequantize())
    return model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--folder", type=Path, default=Path(".demo/smollm2-fp16"))
    arguments.add_argument("--gguf", type=Path, help="the model's file, if not the installed one")
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--calibration", type=int, default=128)
    arguments.add_argument("--evaluation", type=int, default=92)
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--results", type=Path, help="folder for the JSON file")
    options = arguments.parse_args()

    folder = unpack_smollm2(options.folder, options.gguf)
    calibration, evaluation = tokens(options, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    rows = [{"variant": "full precision", "perplexity": perplexity(original, evaluation)}]
    nearest = rounded(copy.deepcopy(original), options.bits, options.group_size)
    rows.append({"variant": "rounding to nearest", "perplexity": perplexity(nearest, evaluation)})
    del nearest
    for row in rows:
        row |= {"AutoGPTQ": "", "seconds": ""}
        print(row, flush=True)
    for variant in VARIANTS:
        settings = {k: v for k, v in variant.items() if k not in ("name", "autogptq")}
        config = BaseQuantizeConfig(options.bits, options.group_size, **settings)
        wrapper = BaseGPTQForCausalLM(copy.deepcopy(original), False, config)
        started = time.perf_counter()
        wrapper.quantize(as_examples(calibration), batch_size=4, show_progress=False)
        seconds = time.perf_counter() - started
        dequantize(wrapper.model, dtype)  # dense products are faster where rows are many
        found = perplexity(wrapper.model, evaluation)
        comparable = options.data and (options.bits, options.group_size) == (4, 128)
        rows.append(
            {
                "variant": variant["name"],
                "perplexity": found,
                "AutoGPTQ": variant.get("autogptq", "") if comparable else "",
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
        del wrapper
    print(table(rows))
    name = f"perplexity-{device}-{options.bits}bit-{options.group_size}g"
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "calibration": list(calibration.shape),
        "evaluation": list(evaluation.shape),
        "text": options.data.name if options.data else "documentation of the running Python",
    }
    print(save(name, {"settings": settings, "rows": rows}, options.results))


if __name__ == "__main__":
    main()
