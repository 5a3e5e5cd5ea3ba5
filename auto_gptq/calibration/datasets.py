"""Texts for calibration and evaluation that are always at hand."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ExamplesError, MissingFileError
from ..optional import require

# What reads a local file; plain text needs nobody's help.
_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def python_documentation() -> str:
    """Give the help topics of the running Python: about 0.6 MB of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def python_source(pattern: str = "*.py", characters: int = 1_000_000) -> str:
    """Give modules of the running Python's standard library, in a random order, always the same."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob(pattern))
    random.Random(0).shuffle(files)
    text = ""
    for file in files:
        if len(text) < characters and "site-packages" not in file.parts:
            text += file.read_text(encoding="utf-8", errors="ignore") + "\n\n"
    return text


# Texts that `quantize` takes by name.  "python" is at hand everywhere: half English, half code.
# Chats need the `datasets` library and the Hub.
NAMED_TEXTS = ("python", "ultrachat")
_CHATS = {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft[:1024]"}


def named_examples(name: str, tokenizer: Any, count: int = 128, length: int = 2048) -> list[Any]:
    """Give examples out of a text that has a name: rows of ids, or chats.

    :param length: tokens of a row, at most what the tokenizer says that the model takes
    :raises ExamplesError: (a ValueError) if no text has that name
    """
    if name == "ultrachat":
        options = dict(_CHATS)
        return columns(load_table(options.pop("path"), **options), ["messages"])["messages"][:count]
    if name != "python":
        raise ExamplesError(
            f"examples is {name[:40]!r}. The texts that have a name are "
            f"{', '.join(map(repr, NAMED_TEXTS))}; put a text of your own into a list."
        )
    length = min(length, getattr(tokenizer, "model_max_length", length))
    halves = [
        token_rows(text(), tokenizer, length) for text in (python_documentation, python_source)
    ]
    return [row for pair in zip(*halves, strict=False) for row in pair][:count]


def token_rows(
    text: str,
    tokenizer: Any,
    length: int = 512,
    seed: int = 0,
) -> Tensor:  # [rows, length] int64
    """Tokenize a text, cut it into rows of equal length and shuffle them; the rest is dropped.

    Each row begins with BOS if the tokenizer begins texts with it: without, Gemma 3 knows nothing.

    :raises ExamplesError: (a ValueError) if the text does not fill a row
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    first = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    length -= len(first)
    if not 0 < length <= len(ids):
        raise ExamplesError(
            f"A row of {length + len(first)} tokens cannot be filled with a text of {len(ids)}."
        )
    rows = ids[: len(ids) // length * length].view(-1, length)
    rows = torch.cat([ids.new_tensor(first).expand(len(rows), -1), rows], 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def as_examples(rows: Tensor) -> list[dict[str, Tensor]]:
    """Give rows of token ids in the form that ``quantize`` takes."""
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def columns(
    source: Any,
    names: Sequence[str] | None = None,
    *,
    splits: Sequence[str] = ("evaluation", "test", "train"),
    **options: Any,
) -> dict[str, list[Any]]:
    """Give columns of a table as lists.

    :param source: a local file or a name on the Hub (see :func:`load_table`), a
        ``datasets.Dataset`` or DatasetDict, a list of dicts or a dict of lists
    :param names: which columns; all if None
    :param splits: of several splits the first of these that is there is taken
    :param options: go to ``datasets.load_dataset``
    :raises ConfigError: (a ValueError) if a column or all of the splits are absent
    """
    table = load_table(source, **options) if isinstance(source, (str, Path)) else source
    if isinstance(table, Mapping) and not all(map(_is_column, table.values())):
        table = _split(table, splits)
    if isinstance(table, Sequence):  # rows
        present = list(table[0]) if len(table) else []
        table = {key: [row.get(key) for row in table] for key in present}
    present = list(getattr(table, "column_names", None) or table)
    for key in names or ():
        if key not in present:
            raise ConfigError(f"There is no column {key!r}; the data has {present}.")
    return {key: list(table[key]) for key in names or present}


def load_table(source: str | Path, **options: Any) -> Any:
    """Read a local .txt, .json, .jsonl, .csv or .parquet file, or a dataset on the Hub.

    :raises MissingLibraryError: (an ImportError) if that needs ``datasets`` and it is not there
    :raises MissingFileError: (a FileNotFoundError) if it can only be a file, and there is none
    """
    file = Path(source)
    if not file.exists() and file.suffix in (".txt", *_BUILDERS):
        raise MissingFileError(f"There is no file {file} (seen from {Path.cwd()}).")
    if not file.is_file():
        return require("datasets", f"Loading {str(source)!r}").load_dataset(str(source), **options)
    if file.suffix not in _BUILDERS:
        return {"text": [file.read_text(encoding="utf-8")]}
    if _BUILDERS[file.suffix] == "json":
        return _json_rows(file)
    datasets = require("datasets", f"Reading {file.suffix} files")
    return datasets.load_dataset(_BUILDERS[file.suffix], data_files=str(file), split="train")


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """Read a list of objects, or one object a line."""
    text = file.read_text(encoding="utf-8")
    try:
        rows = json.loads(text if text.lstrip().startswith("[") else f"[{_joined(text)}]")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is neither a list of objects nor one a line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file} must hold objects, as [{{...}}, ...] or one a line.")
    return list(rows)


def _joined(lines: str) -> str:
    return ",".join(line for line in lines.splitlines() if line.strip())


def _is_column(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not (value and isinstance(value[0], Mapping))


def _split(table: Mapping[str, Any], splits: Sequence[str]) -> Any:
    for split in splits:
        if split in table:
            return table[split]
    raise ConfigError(f"There is none of the splits {list(splits)}; the data has {list(table)}.")
