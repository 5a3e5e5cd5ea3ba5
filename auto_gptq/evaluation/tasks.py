"""AutoGPTQ's three evaluation tasks: language modeling, classification and summarization."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration.blocks import IGNORED, get_dataloader
from ..errors import ConfigError
from .perplexity import surprise
from .rouge import rouge

_SUMMARY_TOKENS = 128


class BaseTask(ABC):
    """A model, a tokenizer and blocks of prompts with labels.

    :param data_name_or_path: what :func:`~auto_gptq.calibration.blocks.get_dataloader` takes
    :param device: where to move the model; None leaves it where it is
    :param kwargs: more for ``get_dataloader``
    """

    merge_prompt_label = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data_name_or_path: Any,
        prompt_col_name: str,
        label_col_name: str,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.device = torch.device(device if device is not None else model.device)
        kwargs["merge_prompt_label"] = self.merge_prompt_label
        self.dl = get_dataloader(
            data_name_or_path, prompt_col_name, label_col_name, tokenizer, **kwargs
        )

    @torch.inference_mode()
    def run(self, generation_config: Any = None) -> dict[str, Any]:
        """Go through the data and give the metric."""
        results = [
            self._measure({k: v.to(self.device) for k, v in batch.items()}, generation_config)
            for batch in self.dl
        ]
        return self._metric(results)

    @abstractmethod
    def _measure(self, batch: Mapping[str, Tensor], generation_config: Any) -> Any:
        """Give what the metric needs to know about one batch."""

    @abstractmethod
    def _metric(self, results: list[Any]) -> dict[str, Any]:
        """Sum up all batches."""

    def _generate(self, batch: Mapping[str, Tensor], config: Any, max_new_tokens: int) -> Any:
        """Give the ids of prompts with what was generated, and the number of texts per prompt."""
        from transformers import GenerationConfig

        config = copy.deepcopy(config) if config is not None else GenerationConfig(do_sample=False)
        if config.max_new_tokens is None:
            config.max_new_tokens = max_new_tokens
        for key in ("pad_token_id", "eos_token_id"):
            if getattr(config, key) is None:
                setattr(config, key, getattr(self.tokenizer, key))
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
        )
        return ids, config.num_return_sequences or 1

    def _labels(self, batch: Mapping[str, Tensor]) -> list[str]:
        return [
            self.tokenizer.decode(row[row != IGNORED], skip_special_tokens=True).strip()
            for row in batch["labels"]
        ]


class LanguageModelingTask(BaseTask):
    """Perplexity of labels, each after its prompt; ``run() -> {"ppl": float}``."""

    merge_prompt_label = True

    def _measure(self, batch: Mapping[str, Tensor], generation_config: Any) -> tuple[float, int]:
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        targets = batch["labels"][:, 1:]
        return surprise(logits[:, :-1], targets), int((targets != IGNORED).sum())

    def _metric(self, results: list[tuple[float, int]]) -> dict[str, float]:
        tokens = sum(count for _, count in results)
        if not tokens:
            raise ConfigError("No label has a token after its first position; nothing to predict.")
        return {"ppl": math.exp(sum(total for total, _ in results) / tokens)}


class SequenceClassificationTask(BaseTask):
    """Share of prompts after which the model writes the right class; ``run() -> {"acc": float}``.

    :param classes: the names of the classes, which the labels are too
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        classes: Sequence[str],
        data_name_or_path: Any,
        prompt_col_name: str,
        label_col_name: str,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model, tokenizer, data_name_or_path, prompt_col_name, label_col_name, device, **kwargs
        )
        self.classes = [name.lower().strip() for name in classes]
        tokenized = tokenizer(list(classes), add_special_tokens=False)["input_ids"]
        self.max_new_tokens = max(len(ids) for ids in tokenized)

    def _measure(self, batch: Mapping[str, Tensor], generation_config: Any) -> list[bool]:
        ids, count = self._generate(batch, generation_config, self.max_new_tokens)
        found = get_predictions(batch["input_ids"], ids, count, self.tokenizer, self.classes)
        wanted = [closest_class(label, self.classes) for label in self._labels(batch)]
        return [a == b for a, b in zip(found, wanted, strict=True)]

    def _metric(self, results: list[list[bool]]) -> dict[str, float]:
        right = [each for result in results for each in result]
        return {"acc": sum(right) / len(right)}


class TextSummarizationTask(BaseTask):
    """ROUGE of generated summaries; ``run()`` gives "rouge-1", "rouge-2" and "rouge-l"."""

    def _measure(
        self, batch: Mapping[str, Tensor], generation_config: Any
    ) -> list[tuple[str, str]]:
        ids, count = self._generate(batch, generation_config, _SUMMARY_TOKENS)
        texts = generated_texts(batch["input_ids"], ids, count, self.tokenizer)
        return [(text[0], label) for text, label in zip(texts, self._labels(batch), strict=True)]

    def _metric(self, results: list[list[tuple[str, str]]]) -> dict[str, dict[str, float]]:
        pairs = [pair for result in results for pair in result]
        return rouge([text for text, _ in pairs], [label for _, label in pairs])


def generated_texts(
    input_ids: Tensor,  # [B, T]
    output_ids: Tensor,  # [B * R, T + new], starting with the input
    num_return_sequences: int,
    tokenizer: Any,
) -> list[list[str]]:
    """Give, for each prompt, the texts generated after it."""
    texts = tokenizer.batch_decode(output_ids[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [
        [text.strip() for text in texts[i : i + num_return_sequences]]
        for i in range(0, len(texts), num_return_sequences)
    ]


def get_predictions(
    input_ids: Tensor,  # [B, T]
    output_ids: Tensor,  # [B * R, T + new], starting with the input
    num_return_sequences: int,
    tokenizer: Any,
    classes: Sequence[str],
) -> list[int]:
    """Give, for each prompt, the class that most of the generated texts are closest to."""
    return [
        Counter(closest_class(text, classes) for text in texts).most_common(1)[0][0]
        for texts in generated_texts(input_ids, output_ids, num_return_sequences, tokenizer)
    ]


def closest_class(text: str, classes: Sequence[str]) -> int:
    """Give the index of the class that takes the fewest edits to reach, case apart."""
    text = text.lower().strip()
    return min(range(len(classes)), key=lambda i: _edits(text, classes[i].lower().strip()))


def _edits(a: str, b: str) -> int:
    """Give the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            change = diagonal + (letter != other)
            diagonal = row[j]
            row[j] = min(change, diagonal + 1, row[j - 1] + 1)
    return row[-1]
