"""Texts for calibration and evaluation that are always at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def python_documentation() -> str:
    """Give the help topics of the running Python: about 0.6 MB of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def token_rows(
    text: str,
    tokenizer: Any,
    length: int = 512,
    seed: int = 0,
) -> Tensor:  # [rows, length] int64
    """Tokenize a text, cut it into rows of equal length and shuffle them; the rest is dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def as_examples(rows: Tensor) -> list[dict[str, Tensor]]:
    """Give rows of token ids in the form that ``quantize`` takes."""
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
