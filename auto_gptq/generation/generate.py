"""``generate`` as transformers has it, with its loop replaced where that is faster."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import request as requests
from .llama import LlamaDecoder, addresses, find_refusal
from .loop import Decoder, Loop
from .request import Request

logger = logging.getLogger(__name__)

# Arguments that ask for another way of decoding, or that transformers hands to its own ways only.
_FOREIGN = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "prompt_lookup_num_tokens",
    "stop_strings",
    "synced_gpus",
    "tokenizer",
)


@dataclass
class _Session:
    """What is kept of a model from call to call."""

    decoder: Decoder
    addresses: tuple[int, ...]
    loop: Loop | None = None


@dataclass
class _Sessions:
    """One session for each model that is alive, and for one call at a time."""

    of: weakref.WeakKeyDictionary[Any, _Session] = field(default_factory=weakref.WeakKeyDictionary)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, model: Any) -> _Session:
        now = addresses(model)
        session = self.of.get(model)
        if session is None or session.addresses != now:
            self.of.pop(model, None)  # frees its cache
            decoder = LlamaDecoder(model)
            session = self.of[model] = _Session(decoder, addresses(model))
        return session


_sessions = _Sessions()


class _NotOurs(Exception):
    """Transformers prepared another way of decoding than token by token."""


def generate(model: Any, **kwargs: Any) -> Any:
    """Generate as ``model.generate(**kwargs)`` does, the same tokens in the same form.

    Greedy decoding and sampling, also in batches padded on the left, run as a loop on the device
    (one captured graph per token on a GPU) if the model's blocks have Llama's shape. Everything
    else, transformers does by itself; why is logged at level DEBUG.
    """
    if any(kwargs.get(name) is not None for name in _FOREIGN):
        return model.generate(**kwargs)
    ours = functools.partial(_decode, streamer=kwargs.get("streamer"))
    try:
        return model.generate(**kwargs, custom_generate=ours)
    except _NotOurs:
        return model.generate(**kwargs)


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Take the place of transformers' ``_sample``, which is called with the same arguments."""
    mode = generation_config.get_generation_mode()
    if mode.value not in ("greedy_search", "sample"):
        raise _NotOurs
    asked = requests.read(
        input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
    )
    reason = asked if isinstance(asked, str) else find_refusal(model, asked.most)
    if reason is None and not _sessions.lock.acquire(blocking=False):
        reason = "another thread is decoding"
    if isinstance(asked, str) or reason is not None:
        logger.debug("transformers' own loop decodes: %s.", reason)
        return model._sample(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer=streamer,
            **model_kwargs,
        )
    try:
        tokens = _run(model, asked, streamer)
    finally:
        _sessions.lock.release()
    return tokens


@torch.inference_mode()
def _run(model: Any, asked: Request, streamer: Any) -> Tensor:
    session = _sessions.open(model)
    if session.loop is None or not session.loop.fits(asked):
        session.loop = None  # frees its graph
        session.loop = Loop(session.decoder, asked)
    tokens = session.loop.run(asked, None if streamer is None else streamer.put)
    if streamer is not None:
        streamer.end()
    return tokens
