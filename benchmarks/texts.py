"""Texts of several kinds that every machine with Python has, as rows of token ids."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from auto_gptq.calibration.datasets import python_documentation, python_source, token_rows

Tokenizer = Callable[..., dict[str, list[int]]]
ROWS_FOR_CALIBRATION = 128


def licences(characters: int = 600_000) -> str:
    """Give the licences of the installed packages, each once."""
    found = set()
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            path = Path(str(file.locate()))
            if path.name.upper().startswith("LICENSE") and path.is_file():
                found.add(path.read_text(encoding="utf-8", errors="ignore"))
    return "\n\n".join(sorted(found, key=len, reverse=True))[:characters]


KINDS = {
    "documentation": python_documentation,
    "source code": python_source,
    "licences": licences,
}


def rows_of(kind: str, tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Give rows for calibration and other ones for evaluation; of a short text only the latter."""
    rows = token_rows(KINDS[kind](), tokenizer, length)
    if len(rows) < ROWS_FOR_CALIBRATION + 32:
        return rows[:0], rows
    return rows[:ROWS_FOR_CALIBRATION], rows[ROWS_FOR_CALIBRATION:]
