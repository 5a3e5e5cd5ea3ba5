"""What a call of ``generate`` asks for, and whether the decoding loop can give it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]

# Logits processors of transformers that only compute with tensors, so that a captured graph can
# repeat them, and the settings that decide what they compute. They may look at the tokens as a set,
# not at how many there are: the loop hands them all places, and those ahead repeat a token.
_PROCESSORS: Mapping[str, tuple[str, ...]] = {
    "TemperatureLogitsWarper": ("temperature",),
    "TopKLogitsWarper": ("top_k", "filter_value"),
    "TopPLogitsWarper": ("top_p", "filter_value", "min_tokens_to_keep"),
    "MinPLogitsWarper": ("min_p", "filter_value", "min_tokens_to_keep"),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "prompt_ignore_length"),
}
_STOPS = ("MaxLengthCriteria", "EosTokenCriteria")
# Arguments for the model that the loop makes itself or that only concern transformers' own.
_MODEL_ARGUMENTS = {
    "attention_mask",
    "cache",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to go on."""

    prompt: Tensor  # [B, T]
    first: Tensor  # [B] int64: the place of each row's first token, after the padding
    most: int  # tokens of a row in the end, padding and prompt among them
    stops: Tensor | None  # [*] int64: a row ends with one of these
    padding: int  # what follows in a row that has ended
    samples: bool
    processors: Sequence[Processor]

    @property
    def settings(self) -> tuple[object, ...]:
        """Give what a captured step has built in, beside the shape of the batch."""
        stops = None if self.stops is None else tuple(self.stops.tolist())
        made = [
            (name, *(_plain(getattr(each, setting, None)) for setting in _PROCESSORS[name]))
            for each in self.processors
            for name in [_name(each)]
        ]
        return (self.samples, self.padding, stops, *made)


def cache_argument(model: Any) -> str:
    """Give the name of a model's argument for its cache, which transformers 5.24 changed."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def read(
    prompt: Tensor,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    config: Any,  # transformers' GenerationConfig, prepared by its generate()
    model_arguments: Mapping[str, Any],
) -> Request | str:
    """Give what is asked for, or say why the loop cannot do it."""
    refusals = *_of_call(prompt, config, model_arguments), *_of_steps(processors, criteria)
    if refusals:
        return refusals[0]
    mask = model_arguments.get("attention_mask")
    if mask is None:
        first = torch.zeros(len(prompt), dtype=torch.long, device=prompt.device)
    else:
        first = (mask == 0).sum(1)
        place = torch.arange(mask.shape[1], device=mask.device)
        if not torch.equal(mask != 0, place >= first[:, None]):
            return "padding is not all on the left"
    ends = [each.eos_token_id for each in criteria if _name(each) == "EosTokenCriteria"]
    padding = config._pad_token_tensor
    return Request(
        prompt,
        first.to(prompt.device),
        min(each.max_length for each in criteria if _name(each) == "MaxLengthCriteria"),
        torch.cat([end.flatten() for end in ends]).to(prompt.device) if ends else None,
        0 if padding is None else int(padding),
        bool(config.do_sample),
        tuple(processors),
    )


def _of_call(prompt: Tensor, config: Any, model_arguments: Mapping[str, Any]) -> Iterator[str]:
    if prompt.dim() != 2 or 0 in prompt.shape:
        yield "there is no prompt of token ids"
    if config.return_dict_in_generate:
        yield "return_dict_in_generate asks for more than tokens"
    if not config.use_cache:
        yield "use_cache is False"
    if config.cache_implementation is not None:
        yield f"cache_implementation is {config.cache_implementation!r}"
    for name, value in model_arguments.items():
        if name not in _MODEL_ARGUMENTS and value is not None:
            yield f"the model is given {name}"
    for name in ("cache", "past_key_values"):
        cache = model_arguments.get(name)
        if cache is not None and cache.get_seq_length():
            yield f"{name} holds tokens already"
    mask = model_arguments.get("attention_mask")
    if mask is not None and mask.shape != prompt.shape:
        yield f"attention_mask has shape {list(mask.shape)}, not that of the prompt"


def _of_steps(processors: Sequence[Any], criteria: Sequence[Any]) -> Iterator[str]:
    for each in processors:
        if _name(each) not in _PROCESSORS:
            yield f"{_name(each)} processes the logits"
        elif isinstance(getattr(each, "prompt_ignore_length", None), int):
            yield f"{_name(each)} leaves the prompt out"
    if not any(_name(each) == "MaxLengthCriteria" for each in criteria):
        yield "there is no maximum length"
    for each in criteria:
        if _name(each) not in _STOPS:
            yield f"{_name(each)} decides when to stop"


def _plain(value: object) -> object:
    return tuple(value.tolist()) if isinstance(value, Tensor) else value


def _name(instance: object) -> str:
    """Name a class of transformers; a subclass of somebody else's has no name here."""
    kind = type(instance)
    return kind.__name__ if kind.__module__.startswith("transformers.") else repr(kind)
