"""The forms in which people hand over examples, made dicts of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from ..errors import ExamplesError
from .datasets import named_examples

HOW = (
    "examples must be a list of dicts with `input_ids` and `attention_mask`, as a tokenizer "
    "returns them: examples=[tokenizer(text) for text in texts]. With "
    "quantize(examples, tokenizer=...) they may also be texts or chats."
)


def as_encodings(examples: Any, tokenizer: Any = None) -> list[Any]:
    """Give one dict with ``input_ids`` and ``attention_mask`` per example.

    Dicts with ``input_ids`` are handed on as they are; ids without a mask are all real.

    :param examples: a list, tensor, ``datasets.Dataset`` or batch that a tokenizer returned, or
        the name of a text: see :data:`.datasets.NAMED_TEXTS`
    :param tokenizer: what turns texts and chats into ids; not needed for ids
    :raises ExamplesError: (a ValueError) saying which example is of what wrong form
    """
    if isinstance(examples, str):
        _require(tokenizer, "examples is a str, the name of a text")
        examples = named_examples(examples, tokenizer)
    return [_encoding(i, example, tokenizer) for i, example in enumerate(_listed(examples))]


def _listed(examples: Any) -> list[Any]:
    if isinstance(examples, Mapping):
        return _rows_of_batch(examples)
    if _is_array(examples):
        return [examples] if examples.ndim == 1 else list(examples)
    is_list = isinstance(examples, Iterable) and isinstance(examples, Sized)
    if isinstance(examples, (str, bytes)) or not is_list:
        raise ExamplesError(f"examples is a {type(examples).__name__}. {HOW}")
    listed = [examples[i] for i in range(len(examples))] if _is_dataset(examples) else [*examples]
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed


def _rows_of_batch(batch: Mapping[str, Any]) -> list[Any]:
    """Part what a tokenizer returned for several texts at once."""
    for key, value in batch.items():
        if _is_dataset(value):
            raise ExamplesError(
                f"examples is a dict of datasets; pass one of them: examples[{key!r}]."
            )
    ids: Any = batch.get("input_ids")
    nested = ids.ndim == 2 if _is_array(ids) else bool(ids) and not isinstance(ids[0], int)
    if not nested:
        raise ExamplesError(f"examples is a {type(batch).__name__}: put it into a list. {HOW}")
    kept = [key for key in ("input_ids", "attention_mask") if key in batch]
    return [
        dict(zip(kept, row, strict=True)) for row in zip(*(batch[key] for key in kept), strict=True)
    ]


def _encoding(i: int, example: Any, tokenizer: Any) -> Any:
    if isinstance(example, Mapping):
        if "input_ids" in example:
            return example
        for key in ("messages", "text"):
            if key in example:
                return _encoding(i, example[key], tokenizer)
        if {"role", "content"} <= set(example):
            raise ExamplesError(
                f"examples[{i}] is a single message; an example is a list of messages: "
                'examples=[[{"role": "user", "content": "..."}, ...], ...].'
            )
        return example  # make_batches names the key it lacks
    if isinstance(example, str):
        return _encoded_text(i, example, tokenizer)
    if isinstance(example, Sequence) and example and isinstance(example[0], Mapping):
        return _encoded_chat(i, example, tokenizer)
    if _is_array(example) or (isinstance(example, Sequence) and not isinstance(example, bytes)):
        return {"input_ids": example, "attention_mask": None}
    raise ExamplesError(f"examples[{i}] is a {type(example).__name__}, not a dict. {HOW}")


def _encoded_text(i: int, text: str, tokenizer: Any, **options: Any) -> Mapping[str, Any]:
    _require(tokenizer, f"examples[{i}] is a str")
    # verbose=False: of texts that are too long, make_batches speaks itself.
    encoded = tokenizer(text, verbose=False, **options)
    return {"input_ids": encoded["input_ids"], "attention_mask": None}


def _require(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise ExamplesError(
            f"{what}. Pass the model's tokenizer as well: quantize(examples, tokenizer=tokenizer)."
        )


def _encoded_chat(i: int, chat: Sequence[Any], tokenizer: Any) -> Mapping[str, Any]:
    wrong = [m for m in chat if not (isinstance(m, Mapping) and {"role", "content"} <= set(m))]
    if wrong:
        raise ExamplesError(
            f"examples[{i}] looks like a chat, but holds {wrong[0]!r}, not a message like "
            '{"role": "user", "content": "..."}.'
        )
    _require(tokenizer, f"examples[{i}] is a chat")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ExamplesError(
            f"examples[{i}] is a chat, but the tokenizer has no chat_template to write it as text. "
            "Set tokenizer.chat_template, or pass texts."
        )
    text = tokenizer.apply_chat_template(list(chat), tokenize=False)
    # The template writes the special tokens itself.
    return _encoded_text(i, text, tokenizer, add_special_tokens=False)


def _is_array(value: Any) -> bool:
    """Tell a tensor or numpy array."""
    return hasattr(value, "ndim") and hasattr(value, "dtype")


def _is_dataset(value: Any) -> bool:
    """Tell a ``datasets.Dataset`` without importing the library."""
    return hasattr(value, "column_names") and hasattr(value, "__getitem__")
