"""From what users call examples to padded batches of token ids."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ExampleKeyError, ExamplesError
from .forms import HOW, as_encodings

logger = logging.getLogger(__name__)

_REQUIRED = ("input_ids", "attention_mask")
# What processors of models that see or hear return, and what counts only beside that.
_OTHER_SENSES = re.compile(r".*(pixel|image|video|audio|vision|input_features|feature_).*")
_BESIDE_THEM = ("token_type_ids", "mm_token_type_ids", "position_ids")
# Below this, Hessians of common widths (some thousand inputs) do not even have full rank.
_FEW_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Token ids of some examples, padded on the left to one length."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 0 where padded
    # What else the model takes: images, sound, ..., as a processor returns it, of one example.
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.attention_mask.sum())


def make_batches(
    examples: Any,
    batch_size: int = 1,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> list[Batch]:
    """Check examples and group them, in order, ``batch_size`` at a time.

    :param examples: ids, or texts and chats beside a ``tokenizer``: see :mod:`.forms`
    :param max_length: longest sequence of the model; the rest of a longer example is cut off
    :raises ExamplesError: (a ValueError) naming the example and what is wrong with it
    :raises ExampleKeyError: (also a KeyError) if an example lacks a key
    """
    if batch_size < 1:
        raise ExamplesError(f"batch_size is {batch_size}; it must be at least 1.")
    encodings = as_encodings(examples, tokenizer)
    if not encodings:
        raise ExamplesError(f"examples is empty; at least one is needed, better 128. {HOW}")
    pairs = [_checked(i, example, vocab_size) for i, example in enumerate(encodings)]
    if max_length is not None:
        pairs = _cut(pairs, max_length)
    tokens = sum(int(mask.sum()) for _, mask in pairs)
    if tokens < _FEW_TOKENS:
        logger.warning(
            "The %d examples hold %d tokens, too few for a good calibration; 128 examples of 512 "
            "to 2048 tokens are usual.",
            len(pairs),
            tokens,
        )
    batches: list[Batch] = []
    waiting: list[tuple[Tensor, Tensor]] = []
    for pair, example in zip(pairs, encodings, strict=True):
        others = {k: v for k, v in example.items() if _OTHER_SENSES.fullmatch(str(k))}
        if others:
            others |= {key: example[key] for key in _BESIDE_THEM if key in example}
        if others or len(waiting) == batch_size:
            batches += [_padded(waiting, pad_token_id)] if waiting else []
            waiting = []
        if others:  # images of several examples cannot be joined in general
            batches.append(Batch(*pair, others))
        else:
            waiting.append(pair)
    return batches + ([_padded(waiting, pad_token_id)] if waiting else [])


def model_inputs(model: Any, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Give the keyword arguments to call a model with, of those that it takes."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
        **batch.others,
    }
    taken = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        inputs = {key: value for key, value in inputs.items() if key in taken}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _cut(pairs: list[tuple[Tensor, Tensor]], length: int) -> list[tuple[Tensor, Tensor]]:
    """Shorten what is longer than the model's longest sequence, padding first."""
    long = [i for i, (ids, _) in enumerate(pairs) if ids.shape[1] > length]
    if not long:
        return pairs
    result, cut = list(pairs), []
    for i in long:
        ids, mask = pairs[i]
        start = int(mask.any(0).int().argmax())  # the first column that is not padding everywhere
        result[i] = ids[:, start : start + length], mask[:, start : start + length]
        if result[i][1].sum() < mask.sum():
            cut.append(i)
    if cut:
        logger.warning(
            "%d of %d examples, the first of them examples[%d], are longer than the %d tokens that "
            "the model takes; what comes after these is left out.",
            len(cut),
            len(pairs),
            cut[0],
            length,
        )
    return result


def merge_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Join neighbouring batches of one length and without padding, up to a number of tokens.

    Nothing but speed depends on it: rows of a batch do not see each other.
    """
    merged: list[Batch] = []
    for batch in batches:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.input_ids.shape[1] == batch.input_ids.shape[1]
            and last.input_ids.numel() + batch.input_ids.numel() <= tokens
            and last.attention_mask.all()
            and batch.attention_mask.all()
            and not (last.others or batch.others)
        ):
            merged[-1] = Batch(
                torch.cat([last.input_ids, batch.input_ids]),
                torch.cat([last.attention_mask, batch.attention_mask]),
            )
        else:
            merged.append(batch)
    return merged


def _checked(i: int, example: Mapping[str, Any], vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Give one example's ids and mask, both ``[rows, T]`` int64."""
    for key in _REQUIRED:
        if key not in example:
            raise ExampleKeyError(
                f"examples[{i}] has no `{key}`; it has {sorted(map(str, example))}. {HOW}"
            )
    ids = _rows(i, "input_ids", example["input_ids"])
    mask = example["attention_mask"]
    mask = torch.ones_like(ids) if mask is None else _rows(i, "attention_mask", mask)
    if ids.shape != mask.shape:
        raise ExamplesError(
            f"examples[{i}]: input_ids has shape {list(ids.shape)} and attention_mask "
            f"{list(mask.shape)}; they must be equal."
        )
    if not mask.any():
        raise ExamplesError(f"examples[{i}] has no token: it is empty or masked entirely.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ExamplesError(
            f"examples[{i}] holds token ids from {low} to {high}, but the model knows "
            f"0 to {(vocab_size or 0) - 1}. Was it tokenized with this model's tokenizer?"
        )
    return ids, mask


def _rows(i: int, key: str, value: Any) -> Tensor:  # [rows, T] int64
    try:
        rows = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExamplesError(
            f"examples[{i}][{key!r}] cannot be made a tensor ({error}). Give one list of ints per "
            "example; rows of different length go into examples of their own."
        ) from None
    if rows.dim() == 1:
        rows = rows.unsqueeze(0)
    if rows.dim() != 2 or rows.is_floating_point():
        raise ExamplesError(
            f"examples[{i}][{key!r}] has {rows.dim()} dimensions and dtype {rows.dtype}; "
            "it must be a list of ints, or a tensor of ints with one or two dimensions."
        )
    return rows.to("cpu", torch.int64)


def _padded(pairs: list[tuple[Tensor, Tensor]], pad_token_id: int) -> Batch:
    length = max(ids.shape[1] for ids, _ in pairs)

    def stacked(rows: list[Tensor], fill: int) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(row, (length - row.shape[1], 0), value=fill) for row in rows])

    return Batch(
        stacked([ids for ids, _ in pairs], pad_token_id), stacked([mask for _, mask in pairs], 0)
    )
