"""Every form in which people hand over examples, with and without a tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.datasets import token_rows
from auto_gptq.calibration.examples import make_batches
from auto_gptq.errors import ExampleKeyError, ExamplesError
from auto_gptq.modeling import BaseGPTQForCausalLM
from tests.tiny import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LONG, SHORT = [5, 6, 7, 8], [9, 10]
TEXTS = ["a b c d", "e f"]  # what the tokenizer below makes these ids of
WORDS = {"a": 5, "b": 6, "c": 7, "d": 8, "e": 9, "f": 10, "<user>": 11}


def _encoded(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Give a real tokenizer, of one id per word, with a chat template and a token at the start."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(WordLevel(WORDS | {"<unk>": 1, "<pad>": 0}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    made.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    )
    return made


def _dataset(**columns: Any) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


BY_IDS: dict[str, Callable[[], Any]] = {
    "dicts of lists": lambda: [_encoded(LONG), _encoded(SHORT)],
    "dicts of tensors": lambda: [
        {key: torch.tensor([row]) for key, row in _encoded(ids).items()} for ids in (LONG, SHORT)
    ],
    "lists": lambda: [LONG, SHORT],
    "tuple of tuples": lambda: (tuple(LONG), tuple(SHORT)),
    "1-D tensors": lambda: [torch.tensor(LONG), torch.tensor(SHORT)],
    "2-D tensors": lambda: [torch.tensor([LONG]), torch.tensor([SHORT])],
    "numpy arrays": lambda: [np.array(LONG), np.array(SHORT)],
    "dataset of ids": lambda: _dataset(
        input_ids=[LONG, SHORT], attention_mask=[[1] * 4, [1] * 2], other=["x", "y"]
    ),
    "dataset of tensors": lambda: _dataset(
        input_ids=[LONG, SHORT], attention_mask=[[1] * 4, [1] * 2]
    ).with_format("torch"),
}


def _expected(batches: Any) -> None:
    (batch,) = batches
    assert batch.input_ids.tolist() == [LONG, [0, 0, *SHORT]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("make", BY_IDS.values(), ids=BY_IDS)
def test_ids_of_every_form_give_the_same_batch(make: Callable[[], Any]) -> None:
    _expected(make_batches(make(), 2))


WITH_TOKENIZER: dict[str, Callable[[Any], Any]] = {
    "texts": lambda _: TEXTS,
    "dicts of text": lambda _: [{"text": text} for text in TEXTS],
    "dataset of text": lambda _: _dataset(text=TEXTS, source=["x", "y"]),
    "single encodings": lambda tokenizer: [tokenizer(text) for text in TEXTS],
    "ids and text": lambda _: [LONG, TEXTS[1]],
    "one batch of lists": lambda tokenizer: tokenizer(TEXTS),
    "one padded batch": lambda tokenizer: tokenizer(
        TEXTS, padding=True, padding_side="left", return_tensors="pt"
    ),
}


@pytest.mark.parametrize("make", WITH_TOKENIZER.values(), ids=WITH_TOKENIZER)
def test_texts_of_every_form_give_the_same_batch(
    make: Callable[[Any], Any], tokenizer: Any
) -> None:
    _expected(make_batches(make(tokenizer), 2, tokenizer=tokenizer))


CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.mark.parametrize(
    "make",
    [
        lambda: CHATS,
        lambda: [{"messages": chat} for chat in CHATS],
        lambda: _dataset(messages=CHATS),
    ],
    ids=["lists of messages", "dicts", "dataset"],
)
def test_chats_go_through_the_template(make: Callable[[], Any], tokenizer: Any) -> None:
    (batch,) = make_batches(make(), 2, tokenizer=tokenizer)
    assert batch.input_ids.tolist() == [[11, *LONG], [0, 0, 11, *SHORT]]


def test_one_sequence_alone_is_one_example() -> None:
    for alone in (LONG, torch.tensor(LONG), torch.tensor([LONG])):
        (batch,) = make_batches(alone)
        assert batch.input_ids.tolist() == [LONG]


MESSAGE = {"role": "user", "content": "a"}
BAD: dict[str, tuple[Any, str]] = {
    "text without tokenizer": (["a"], r"examples\[0\] is a str\. Pass .*tokenizer=tokenizer"),
    "chat without tokenizer": ([[MESSAGE]], r"examples\[0\] is a chat\. Pass .*tokenizer"),
    "bare messages": ([MESSAGE], r"examples\[0\] is a single message.*list of messages"),
    "half a message": ([[MESSAGE, {"role": "user"}]], r"holds \{'role': 'user'\}, not a message"),
    "generator": ((ids for ids in [LONG]), "examples is a generator"),
    "number": ([LONG, 3], r"examples\[1\] is a int, not a dict"),
    "nothing": ([LONG, None], r"examples\[1\] is a NoneType"),
    "bytes": ([b"a"], r"examples\[0\] is a bytes"),
    "empty sequence": ([[]], r"examples\[0\]"),
}


@pytest.mark.parametrize(("examples", "message"), BAD.values(), ids=BAD)
def test_forms_that_cannot_be_used_are_named(examples: Any, message: str) -> None:
    with pytest.raises(ExamplesError, match=message):
        make_batches(examples)


def test_a_dict_of_datasets_asks_for_one_of_them() -> None:
    with pytest.raises(ExamplesError, match=r"pass one of them: examples\['train'\]"):
        make_batches({"train": _dataset(text=TEXTS)})


def test_a_chat_without_a_template_is_named(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ExamplesError, match=r"examples\[0\] is a chat.*no chat_template"):
        make_batches(CHATS, tokenizer=tokenizer)


def test_a_dict_without_a_mask_stays_a_key_error() -> None:
    for examples in ([{"input_ids": LONG}], _dataset(input_ids=[LONG]), {"input_ids": [LONG]}):
        with pytest.raises(ExampleKeyError, match="no `attention_mask`"):
            make_batches(examples)


def test_what_is_too_long_is_cut_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    padded = {"input_ids": [[0, 0, *LONG]], "attention_mask": [[0, 0, 1, 1, 1, 1]]}
    with caplog.at_level(logging.WARNING):
        batches = make_batches([SHORT, [*LONG, *LONG], padded, [*LONG, 1]], max_length=4)
    assert [batch.input_ids.tolist() for batch in batches] == [[SHORT], [LONG], [LONG], [LONG]]
    assert [batch.tokens for batch in batches] == [2, 4, 4, 4]
    said = [record.message for record in caplog.records if "longer" in record.message]
    assert len(said) == 1
    assert said[0].startswith(
        "2 of 4 examples, the first of them examples[1], are longer than the 4"
    )


def test_too_few_tokens_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_batches([LONG, SHORT])
        assert [r.message for r in caplog.records if "2 examples hold 6 tokens" in r.message]
        assert len(caplog.records) == 1
        caplog.clear()
        make_batches(torch.ones(8, 512, dtype=torch.long))
    assert not caplog.records


ALL = {name: (lambda _, make=make: make()) for name, make in BY_IDS.items()} | WITH_TOKENIZER


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_padding_of_no_form_enters_a_hessian(make: Callable[[Any], Any], tokenizer: Any) -> None:
    config = BaseQuantizeConfig(group_size=32, lm_head=True)
    wrapper = BaseGPTQForCausalLM(tiny_model(num_hidden_layers=1), False, config)
    wrapper.quantize(make(tokenizer), batch_size=2, tokenizer=tokenizer)
    assert {entry.tokens for entry in wrapper.report} == {len(LONG) + len(SHORT)}
    assert wrapper.calibration_rows == 2


def test_a_model_cuts_at_its_longest_sequence() -> None:
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=16)
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32))
    wrapper.quantize([list(range(2, 40))])
    assert {entry.tokens for entry in wrapper.report} == {16}


@pytest.mark.parametrize("with_bos", [True, False])
def test_rows_of_a_text_begin_as_the_tokenizer_begins_texts(with_bos: bool) -> None:
    """Gemma 3 without its BOS has a perplexity of many thousands."""
    tokenizer = tiny_tokenizer(with_bos)
    rows = token_rows("abcdefgh" * 8, tokenizer, length=16)
    assert rows.shape == (4, 16)
    assert rows[:, 0].eq(1).all() == with_bos
    assert not rows[:, 1:].eq(1).any()


def test_a_text_has_a_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches("python", tokenizer=tokenizer)
    assert len(batches) >= 32
    assert {batch.input_ids.shape[1] for batch in batches} == {2048}
    chat = [{"role": "user", "content": "a b"}]
    asked = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options["split"]))
        return {"messages": [chat, chat]}

    monkeypatch.setattr("auto_gptq.calibration.datasets.load_table", load)
    assert [len(batch.input_ids) for batch in make_batches("ultrachat", 2, tokenizer=tokenizer)]
    assert asked == [("HuggingFaceH4/ultrachat_200k", "train_sft[:1024]")]
    with pytest.raises(ExamplesError, match=r"'my text'\. The texts that have a name are 'python'"):
        make_batches("my text", tokenizer=tokenizer)
