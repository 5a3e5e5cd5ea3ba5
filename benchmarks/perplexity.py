"""Perplexity of a model before and after quantizing it with every preset, on several kinds of text.

Each table of a model takes about a minute on a GPU with 128 x 512 tokens of calibration; on a CPU
try ``--calibration 16 --evaluation 8``, or ``--model llama``, which first trains a small model.  A
table calibrates on documentation or source code; all texts are evaluated on.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import models
import torch
from measure import save, table
from safetensors.torch import load_file
from texts import KINDS, rows_of
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples
from auto_gptq.evaluation.perplexity import perplexity
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.surgery import dequantize


@dataclass(frozen=True)
class Run:
    """One quantization: a preset, what differs from it, and the text to calibrate on."""

    preset: str
    bits: int = 4
    changes: dict[str, Any] = field(default_factory=dict)
    text: str = "documentation"
    rows: int | None = None  # to calibrate on; all if None

    @property
    def name(self) -> str:
        return self.preset + "".join(f", {key}={value}" for key, value in self.changes.items())

    @property
    def source(self) -> str:
        return self.text + ("" if self.rows is None else f", {self.rows} rows")


_FILES = {"smollm2": models.smollm2, "gemma3": models.gemma3}
_PRESETS = ("compatible", "default", "best")
# Each table goes to a file of its own; runs in order of importance, `--seconds` cuts the list off.
TABLES: dict[str, list[Run]] = {
    "presets": [Run(preset, bits) for bits in (4, 3) for preset in _PRESETS],
    "other-text": [Run(p, bits, text="source code") for bits in (4, 3) for p in _PRESETS],
    "few-rows": [
        Run(preset, bits, rows=rows) for rows in (16, 8) for bits in (3, 4) for preset in _PRESETS
    ],
    "grids": [
        *(Run(preset, 2) for preset in _PRESETS),
        *(Run(preset, 8) for preset in _PRESETS),
        *(Run(p, bits, {"sym": False}) for bits in (3, 4, 2) for p in _PRESETS),
        *(Run(p, bits, {"group_size": 32}) for bits in (3, 4) for p in _PRESETS),
        *(Run(p, bits, {"group_size": -1}) for bits in (4, 3) for p in _PRESETS),
    ],
    "parts": [
        Run("default"),
        *(Run("default", bits, {"tuning_epochs": 3}) for bits in (4, 3)),
        Run("compatible", changes={"desc_act": False}),
        *(Run("default", changes={"correction": share}) for share in (0.0, 0.5, 1.0)),
        Run("default", changes={"signed_scales": False}),
        Run("default", changes={"scale_search": False}),
        Run("default", changes={"desc_act": False}),
        Run("default", changes={"damp_percent": 0.01}),
    ],
}


def read_texts(options: argparse.Namespace, tokenizer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Give rows for calibration and for evaluation, by kind of text."""
    if options.data is None:
        texts = {kind: rows_of(kind, tokenizer, options.length) for kind in KINDS}
    else:
        rows = load_file(options.data)
        texts = {
            kind: (rows[f"{kind}, calibration"].long(), rows[f"{kind}, evaluation"].long())
            for kind in KINDS
        }
    return {
        kind: (calibration[: options.calibration], evaluation[: options.evaluation])
        for kind, (calibration, evaluation) in texts.items()
    }


def measure(
    model: Any, run: Run, texts: dict[str, tuple[Tensor, Tensor]], group_size: int
) -> dict[str, Any]:
    """Quantize a copy of the model and take its perplexity on every text."""
    changes = {"group_size": group_size} | run.changes
    config = BaseQuantizeConfig.preset(run.preset, run.bits, **changes)
    wrapper = BaseGPTQForCausalLM(copy.deepcopy(model), False, config)
    started = time.perf_counter()
    rows = texts[run.text][0][: run.rows]
    wrapper.quantize(as_examples(rows), batch_size=4, show_progress=False)
    seconds = time.perf_counter() - started
    dequantize(wrapper.model, model.dtype)  # dense products are faster where rows are many
    row = {"settings": run.name, "bits": run.bits, "calibrated on": run.source}
    return row | _perplexities(wrapper.model, texts) | {"seconds": seconds}


def _perplexities(model: Any, texts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    at_once = 16 if model.device.type == "cuda" else 4
    return {kind: perplexity(model, rows, at_once) for kind, (_, rows) in texts.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=(*_FILES, "llama", "gpt2"), default="smollm2")
    arguments.add_argument("--folder", type=Path, help="where the model is kept, to be made once")
    arguments.add_argument("--gguf", type=Path, help="the model's file, if not the installed one")
    arguments.add_argument("--steps", type=int, help="of training; what fits the device if absent")
    arguments.add_argument("--data", type=Path, help="token rows of every text, made before")
    arguments.add_argument("--calibration", type=int, default=128)
    arguments.add_argument("--evaluation", type=int, default=92)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--tables", choices=TABLES, nargs="+", default=["presets"])
    arguments.add_argument("--bits", type=int, help="of all runs; every width if absent")
    arguments.add_argument("--seconds", type=float, default=math.inf, help="begin no run after it")
    arguments.add_argument("--results", type=Path, help="folder for the JSON file")
    options = arguments.parse_args()

    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model in _FILES:
        folder = options.folder or Path(f".demo/{options.model}-fp16")
        model, tokenizer = _FILES[options.model](folder, options.gguf, device)
    else:
        training = models.TRAININGS[device]
        training = replace(training, steps=options.steps or training.steps)
        folder = options.folder or Path(f".demo/trained-{options.model}-{device}")
        model, tokenizer = models.trained(options.model, folder, training, device)
    texts = read_texts(options, tokenizer)
    whole = {"settings": "full precision", "bits": "", "calibrated on": ""}
    whole |= _perplexities(model, texts) | {"seconds": ""}
    print(whole, flush=True)
    settings = {
        "model": options.model,
        "weights": sum(p.numel() for p in model.parameters()),
        "group size": options.group_size,
        "calibration": [options.calibration, options.length],
        "evaluation": {kind: list(evaluation.shape) for kind, (_, evaluation) in texts.items()},
        "texts": options.data.name if options.data else "of the running Python",
    }
    for name in options.tables:
        rows = [whole]
        parts = ["perplexity", options.model, device, *([] if name == "presets" else [name])]
        parts += [] if options.bits is None else [f"{options.bits}bit"]
        for run in [run for run in TABLES[name] if options.bits in (None, run.bits)]:
            if time.perf_counter() - started > options.seconds:
                break
            rows.append(measure(model, run, texts, options.group_size))
            print(rows[-1], flush=True)
            save("-".join(parts), {"settings": settings, "rows": rows}, options.results)
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
