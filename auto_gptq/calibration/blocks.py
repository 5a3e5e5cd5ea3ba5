"""Prompts with their answers → blocks of samples of about one length, padded on the left."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import ConfigError
from .datasets import columns

IGNORED = -100  # a label that no loss counts
_FILLS = {"attention_mask": 0, "labels": IGNORED}  # input_ids are filled with the pad token

Block = dict[str, list[list[int]]]  # input_ids, attention_mask, labels: one list per sample


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt and its label."""

    prompt: list[int]
    label: list[int]

    def cut(self, length: int, from_prompt: bool) -> Sample:
        """Shorten to a length by the start of the prompt, or by the end of the label."""
        excess = max(len(self.prompt) + len(self.label) - length, 0)
        if from_prompt:
            return Sample(self.prompt[excess:], self.label[:length])
        return Sample(self.prompt[:length], self.label[: max(len(self.label) - excess, 0)])

    def row(self, merged: bool) -> dict[str, list[int]]:
        """Give what the model reads and what is expected of it."""
        ids = self.prompt + self.label if merged else self.prompt
        labels = [IGNORED] * len(self.prompt) + self.label if merged else self.label
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def make_data_block(
    samples: Mapping[str, Sequence[str]],
    prompt_col_name: str,
    label_col_name: str,
    tokenizer: Any,
    preprocess_fn: Callable[..., Mapping[str, Sequence[str]]] | None = None,
    sample_max_len: int = 1024,
    block_max_len: int = 2048,
    add_eos_token: bool = False,
    truncate_prompt: bool = True,
    merge_prompt_label: bool = False,
) -> dict[str, list[list[list[int]]]]:
    """Tokenize samples and pack them, sorted by length, into blocks.

    A sample without a label is left out.

    :param samples: columns of texts
    :param preprocess_fn: turns the columns into those named here
    :param sample_max_len: tokens of a prompt with its label; longer prompts lose their start, or
        with ``truncate_prompt=False`` labels their end
    :param block_max_len: tokens of a block, padding included; a longer sample has its own
    :param merge_prompt_label: let the model read the label after the prompt, as a causal model
        learns it; the labels then are as long as the input and ignore the prompt
    """
    if sample_max_len < 1 or block_max_len < 1:
        raise ConfigError(
            f"sample_max_len is {sample_max_len} and block_max_len {block_max_len}; "
            "both must be at least 1."
        )
    if preprocess_fn is not None:
        samples = preprocess_fn(samples)
    texts = columns(dict(samples), [prompt_col_name, label_col_name])
    end = [tokenizer.eos_token_id] if add_eos_token else []
    rows = []
    for prompt, label in zip(texts[prompt_col_name], texts[label_col_name], strict=True):
        answer = tokenizer(label, add_special_tokens=False, verbose=False)["input_ids"] + end
        sample = Sample(tokenizer(prompt, verbose=False)["input_ids"], answer)
        sample = sample.cut(sample_max_len, from_prompt=truncate_prompt)
        if sample.label:
            rows.append(sample.row(merge_prompt_label))
    rows.sort(key=lambda row: len(row["input_ids"]))
    blocks = [_padded(block, _pad_token_id(tokenizer)) for block in _packed(rows, block_max_len)]
    return {key: [block[key] for block in blocks] for key in ("input_ids", *_FILLS)}


def _packed(
    rows: list[dict[str, list[int]]],  # sorted by length
    most: int,
) -> list[list[dict[str, list[int]]]]:
    blocks: list[list[dict[str, list[int]]]] = []
    for row in rows:
        if blocks and (len(blocks[-1]) + 1) * len(row["input_ids"]) <= most:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return blocks


def _padded(rows: list[dict[str, list[int]]], pad_token_id: int) -> Block:
    block: Block = {}
    for key in ("input_ids", *_FILLS):
        longest = max(len(row[key]) for row in rows)
        fill = _FILLS.get(key, pad_token_id)
        block[key] = [[fill] * (longest - len(row[key])) + row[key] for row in rows]
    return block


def collate_data(blocks: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Join blocks to one batch of int64 tensors ``[rows, T]``, padded on the left."""
    batch = {}
    for key in ("input_ids", *_FILLS):
        tensors = [torch.as_tensor(block[key], dtype=torch.int64) for block in blocks]
        longest = max(tensor.shape[1] for tensor in tensors)
        fill = _FILLS.get(key, pad_token_id)
        pad = torch.nn.functional.pad
        batch[key] = torch.cat(
            [pad(tensor, (longest - tensor.shape[1], 0), value=fill) for tensor in tensors]
        )
    return batch


def get_dataloader(
    data_path_or_name: Any,
    prompt_col_name: str,
    label_col_name: str,
    tokenizer: Any,
    load_fn: Callable[..., Any] | None = None,
    preprocess_fn: Callable[..., Mapping[str, Sequence[str]]] | None = None,
    num_samples: int = 128,
    sample_max_len: int = 1024,
    block_max_len: int = 2048,
    add_eos_token: bool = False,
    truncate_prompt: bool = True,
    merge_prompt_label: bool = False,
    load_fn_kwargs: dict[str, Any] | None = None,
    preprocess_fn_kwargs: dict[str, Any] | None = None,
    **dataloader_kwargs: Any,
) -> DataLoader[Any]:
    """Draw samples at random from a dataset and give them as blocks, one per batch.

    :param data_path_or_name: a local .txt, .json, .jsonl, .csv or .parquet file, a name on the
        Hub, or the data itself: a ``datasets.Dataset``, a list of dicts, a dict of lists
    :param load_fn: called with ``data_path_or_name`` and ``load_fn_kwargs`` instead; of several
        splits "evaluation", "test" or "train" is taken
    :param dataloader_kwargs: go to torch's DataLoader
    """
    source = data_path_or_name
    if load_fn is not None:
        source = load_fn(source, **(load_fn_kwargs or {}))
    table = columns(source, **(load_fn_kwargs or {} if load_fn is None else {}))
    count = max((len(column) for column in table.values()), default=0)
    chosen = random.sample(range(count), min(count, num_samples))
    made = make_data_block(
        {key: [column[i] for i in chosen] for key, column in table.items()},
        prompt_col_name,
        label_col_name,
        tokenizer,
        partial(preprocess_fn, **(preprocess_fn_kwargs or {})) if preprocess_fn else None,
        sample_max_len,
        block_max_len,
        add_eos_token,
        truncate_prompt,
        merge_prompt_label,
    )
    if not made["input_ids"]:
        raise ConfigError(
            f"None of {len(chosen)} samples has a label within sample_max_len={sample_max_len}."
        )
    blocks = [
        {key: made[key][i] for key in ("input_ids", *_FILLS)} for i in range(len(made["input_ids"]))
    ]
    collate = partial(collate_data, pad_token_id=_pad_token_id(tokenizer))
    # Each block is a batch already, and runs faster beside those of its length.
    options = {"batch_size": 1, "shuffle": False, "collate_fn": collate} | dataloader_kwargs
    return DataLoader(blocks, **options)  # type: ignore[arg-type]


def _pad_token_id(tokenizer: Any) -> int:
    """Any id will do, since padding is masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
