"""Perplexity over rows of tokens, and over a text as AutoGPTQ's ``Perplexity`` measures it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..calibration.datasets import columns
from ..errors import ConfigError
from ..generation.request import cache_argument

_FIRST_SCORED = 512  # as llama.cpp: in its first half at most, a window has too little context


@torch.inference_mode()
def perplexity(
    model: Any,
    rows: Tensor,  # [R, T] int64
    batch_size: int = 4,
) -> float:
    """Give exp of the mean negative log-likelihood of every token but the first of each row.

    The logits of a row are turned into probabilities in fp32, whatever dtype the model runs in.
    """
    total = 0.0
    for batch in rows.split(batch_size):
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        total += surprise(logits[:, :-1], ids[:, 1:])
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def surprise(
    logits: Tensor,  # [..., T, V]
    targets: Tensor,  # [..., T]
) -> float:
    """Sum the negative log-likelihoods of tokens but those labelled -100, in fp32."""
    loss = F.cross_entropy(
        logits.float().flatten(0, -2), targets.to(logits.device).flatten(), reduction="sum"
    )
    return loss.item()


class Perplexity:
    """Perplexity of a text in windows, as llama.cpp measures it: only well-founded guesses count.

    The rows of a column are joined to one text; empty rows become line breaks.

    :param dataset_path: a name on the Hub, a local .txt, .json, .jsonl, .csv or .parquet file, or
        the data itself: a ``datasets.Dataset`` or a list of dicts; "wikitext" is WikiText-2
    :raises ConfigError: (a ValueError) if there is no such column
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dataset_path: Any = "wikitext",
        dataset_name: str | None = None,
        split: str = "test",
        text_column: str = "text",
    ) -> None:
        if isinstance(dataset_path, str) and dataset_path == "wikitext":
            dataset_name = "wikitext-2-raw-v1"
        self._model = model
        self._tokenizer = tokenizer
        rows = columns(dataset_path, [text_column], name=dataset_name, splits=[split])[text_column]
        self._text = "".join(row or " \n" for row in rows)

    def calculate_perplexity(self, n_ctx: int = 512, n_batch: int = 512) -> list[float]:
        """Give the perplexity up to each window; the last is the result.

        :param n_ctx: tokens of a window; the first half of them, at most 512, are only context
        :param n_batch: tokens that run through the model at a time
        :raises ConfigError: (a ValueError) if the text is shorter than a window
        """
        if n_ctx < 3 or n_batch < 1:
            raise ConfigError(
                f"n_ctx is {n_ctx} and n_batch {n_batch}; they must be at least 3 and 1."
            )
        ids = self._tokenizer(self._text, truncation=False, verbose=False)["input_ids"]
        windows = [ids[i : i + n_ctx] for i in range(0, len(ids) - n_ctx + 1, n_ctx)]
        if not windows:
            raise ConfigError(
                f"The text has {len(ids)} tokens, fewer than one window of n_ctx={n_ctx}. "
                "Give more text or a smaller n_ctx."
            )
        first = min(_FIRST_SCORED, n_ctx // 2)
        total, result = 0.0, []
        for count, window in enumerate(tqdm(windows, "perplexity", disable=None), 1):
            total += self._surprise_of(torch.tensor(window), first, n_batch)
            result.append(math.exp(total / (count * (n_ctx - 1 - first))))
        return result

    @torch.inference_mode()
    def _surprise_of(
        self,
        window: Tensor,  # [T] int64
        first: int,
        n_batch: int,
    ) -> float:
        """Sum over the tokens after position ``first``."""
        seen = window.clone()
        if self._tokenizer.bos_token_id is not None:
            seen[0] = self._tokenizer.bos_token_id
        total, start = 0.0, 0
        for logits in self._logits(seen, n_batch):
            end = start + len(logits)
            begin, stop = max(start, first), min(end, len(window) - 1)
            if begin < stop:
                total += surprise(
                    logits[begin - start : stop - start], window[begin + 1 : stop + 1]
                )
            start = end
        return total

    def _logits(
        self,
        window: Tensor,  # [T] int64
        n_batch: int,
    ) -> Iterator[Tensor]:  # [up to n_batch, V]
        cache: dict[str, Any] = {}
        one_go = n_batch >= len(window)
        for chunk in window.to(self._model.device)[None].split(n_batch, dim=1):
            output = self._model(input_ids=chunk, use_cache=not one_go, **cache)
            yield output.logits[0]
            if not one_go:
                name = cache_argument(self._model)
                cache = {name: getattr(output, name)}
