"""Our decoding loop gives the tokens that transformers' own gives, or lets transformers decode."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TextStreamer

from auto_gptq.architectures.decoding import LLAMA_SHAPED
from auto_gptq.generation import generate as generation
from auto_gptq.generation.generate import generate
from auto_gptq.generation.request import cache_argument
from tests.tiny import VOCABULARY, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "phi3": {"eos_token_id": 2, "bos_token_id": 1},
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with stops": {"eos_token_id": [5, 9, 33, 77, 100, 130, 201]},
    "greedy, one token": {"max_new_tokens": 1},
    "greedy to max_length": {"max_new_tokens": None, "max_length": 33},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "sampled with everything": {
        "do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.001,
        "repetition_penalty": 1.3, "eos_token_id": [5, 9, 33, 77], "num_return_sequences": 2,
    },
}  # fmt: skip


def model_of(model_type: str, device: torch.device) -> Any:
    model = tiny_model(model_type, torch.float32, **SETTINGS.get(model_type, {}))
    # Random weights of the usual size hardly tell one token from another.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    return model.to(device)


def prompts(device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 9), device=device)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compare(model: Any, **arguments: Any) -> None:
    """Hold generate to transformers', the random numbers the same."""
    torch.manual_seed(1)
    wanted = model.generate(**arguments)
    torch.manual_seed(1)
    assert torch.equal(generate(model, **arguments), wanted)


@pytest.mark.parametrize("model_type", LLAMA_SHAPED)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_tokens_are_those_of_transformers(
    device, model_type: str, way: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger=generation.logger.name)
    model = model_of(model_type, device)
    arguments = prompts(device) | {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    compare(model, **(arguments | way))
    assert not caplog.messages  # that is, transformers was not asked to decode


def test_a_session_serves_calls_of_every_shape(device) -> None:
    model = model_of("llama", device)
    inputs = prompts(device)
    for count, width, new in ((3, 9, 20), (3, 9, 20), (3, 5, 12), (1, 9, 300), (2, 9, 7)):
        ids = inputs["input_ids"][:count, :width]
        compare(model, input_ids=ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
    compare(model, input_ids=ids, max_new_tokens=7, do_sample=True, top_k=7, pad_token_id=0)


def test_changed_weights_are_seen(device) -> None:
    model = model_of("llama", device)
    arguments = {"input_ids": prompts(device)["input_ids"], "max_new_tokens": 9, "do_sample": False}
    compare(model, **arguments, pad_token_id=0)
    first = model.model.layers[0].mlp
    first.down_proj = nn.Linear(96, 64, bias=False, device=device)
    compare(model, **arguments, pad_token_id=0)
    with torch.no_grad():
        first.down_proj.weight.mul_(3)
    compare(model, **arguments, pad_token_id=0)


def test_a_model_can_be_freed(device) -> None:
    model = model_of("llama", device)
    generate(model, **prompts(device), max_new_tokens=3, pad_token_id=0)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_streamer_gets_every_token(device, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = model_of("llama", device), tiny_tokenizer()
    ids = prompts(device)["input_ids"][:1]
    texts = []
    for run in (model.generate, lambda **kwargs: generate(model, **kwargs)):
        run(input_ids=ids, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer))
        texts.append(capsys.readouterr().out)
    assert texts[0] and texts[0] == texts[1]


def test_one_thread_at_a_time_decodes_here() -> None:
    model = model_of("llama", torch.device("cpu"))
    inputs = prompts(torch.device("cpu")) | {"do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**inputs, max_new_tokens=20)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(generate(model, **inputs, max_new_tokens=20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(each, wanted) for each in found)


def _with_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "another shape of blocks": ("GemmaForCausalLM is not among", {"type": "gemma"}, {}),
    "a window that is too short": (
        "sliding window of 16 tokens is shorter", {"type": "mistral", "sliding_window": 16}, {}),
    "channels": ("intermediate_size is 36", {"type": "llama", "intermediate_size": 36}, {}),
    "hooks": ("model.layers.1.mlp has hooks", {"change": _with_hook}, {}),
    "training": ("training mode", {"change": lambda model: model.train()}, {}),
    "another rotation": (
        "rope_type is 'dynamic'",
        {"type": "llama",
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}),
    "scores": ("more than tokens", {}, {"return_dict_in_generate": True, "output_scores": True}),
    "a processor": (
        "NoRepeatNGramLogitsProcessor processes", {}, {"no_repeat_ngram_size": 2}),
    "a criterion": ("MaxTimeCriteria decides", {}, {"max_time": 1000.0}),
    "no cache": ("use_cache is False", {}, {"use_cache": False}),
    "a cache of a kind": ("cache_implementation", {}, {"cache_implementation": "static"}),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "made", "asked"), REFUSED.values(), ids=REFUSED)
def test_transformers_decodes_what_is_not_covered(
    caplog: pytest.LogCaptureFixture, reason: str, made: dict[str, Any], asked: dict[str, Any]
) -> None:
    caplog.set_level(logging.DEBUG, logger=generation.logger.name)
    made = dict(made)
    change = made.pop("change", None)
    model = tiny_model(made.pop("type", "llama"), torch.float32, **made)
    if change is not None:
        change(model)
    arguments = prompts(torch.device("cpu")) | {"max_new_tokens": 20, "do_sample": False}
    arguments |= {"pad_token_id": 0} | asked
    wanted, found = model.generate(**arguments), generate(model, **arguments)
    if not torch.is_tensor(wanted):
        wanted, found = wanted.sequences, found.sequences
    assert torch.equal(found, wanted)
    assert reason in "\n".join(caplog.messages)


def test_right_padding_is_left_to_transformers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=generation.logger.name)
    model = tiny_model("llama", torch.float32)
    inputs = prompts(torch.device("cpu"))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    compare(model, **inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert "not all on the left" in "\n".join(caplog.messages)


@pytest.mark.parametrize(
    "asked",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_other_ways_of_decoding_are_transformers_own(asked: dict[str, Any]) -> None:
    model = tiny_model("llama", torch.float32)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (1, 9)), "pad_token_id": 0}
    compare(model, **inputs, max_new_tokens=6, **asked)


def test_a_cache_that_holds_tokens_goes_on_in_transformers() -> None:
    model = tiny_model("llama", torch.float32)
    ids = torch.randint(3, VOCABULARY, (1, 9))

    def continued(run: Any) -> Tensor:
        from transformers import DynamicCache

        given = {cache_argument(model): DynamicCache()}
        model(input_ids=ids[:, :5], **given)
        tokens: Tensor = run(
            input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **given
        )
        return tokens

    wanted = continued(model.generate)
    assert torch.equal(continued(lambda **kwargs: generate(model, **kwargs)), wanted)
