from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from auto_gptq.evaluation.rouge import rouge
from auto_gptq.evaluation.tasks import (
    LanguageModelingTask,
    SequenceClassificationTask,
    TextSummarizationTask,
    closest_class,
    get_predictions,
)
from tests.tiny import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

NAMES = ("text", "answer")


class Parrot:
    """A model that writes what it is told to, as long as it may."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, answers: dict[str, list[str]]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.asked: list[int] = []

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any) -> Any:
        self.asked.append(generation_config.max_new_tokens)
        rows = []
        for ids in input_ids:
            prompt = self.tokenizer.decode(ids, skip_special_tokens=True)
            for answer in self.answers[prompt][: generation_config.num_return_sequences or 1]:
                new = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
                new = new[: generation_config.max_new_tokens]
                pad = [self.tokenizer.pad_token_id] * (generation_config.max_new_tokens - len(new))
                rows.append([*ids.tolist(), *new, *pad])
        return torch.tensor(rows)


def test_perplexity_counts_the_labels_only() -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    data = [{"text": "a prompt, ", "answer": "its answer"}, {"text": "b", "answer": "another one"}]
    surprise = []
    for row in data:
        prompt = tokenizer(row["text"])["input_ids"]
        ids = prompt + tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        likelihoods = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        surprise += [-likelihoods[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    wanted = math.exp(sum(surprise) / len(surprise))
    for block_max_len in (2048, 1):  # padded together, or alone
        task = LanguageModelingTask(model, tokenizer, data, *NAMES, block_max_len=block_max_len)
        assert task.run() == {"ppl": pytest.approx(wanted, rel=1e-5)}


CLASSES = ["Negative sentiment", "Positive"]


def test_a_class_is_told_by_the_closest_text_and_the_majority() -> None:
    tokenizer = tiny_tokenizer()
    answers = {
        "good": [" positive.", "Negative sentiment", "positiv"],
        "bad": ["negative sentiment", "positive", "negativ sent"],
        "so so": ["positive", "positive", "negative"],
    }
    data = [
        {"text": "good", "answer": "Positive"},
        {"text": "bad", "answer": "Negative sentiment"},
        {"text": "so so", "answer": "Negative sentiment"},
    ]
    model = Parrot(tokenizer, answers)
    task = SequenceClassificationTask(model, tokenizer, CLASSES, data, *NAMES)
    config = SimpleNamespace(
        num_return_sequences=3, max_new_tokens=None, pad_token_id=None, eos_token_id=None
    )
    assert task.run(config) == {"acc": pytest.approx(2 / 3)}


def test_as_many_tokens_are_generated_as_the_longest_class_has() -> None:
    """AutoGPTQ counted the letters of "attention_mask" instead: always 14."""
    tokenizer = tiny_tokenizer()
    model = Parrot(tokenizer, {"good": ["Positive"]})
    data = [{"text": "good", "answer": "Positive"}]
    assert SequenceClassificationTask(model, tokenizer, CLASSES, data, *NAMES).run() == {"acc": 1}
    assert model.asked == [len("Negative sentiment")]


def test_a_summary_is_compared_with_its_label() -> None:
    tokenizer = tiny_tokenizer()
    model = Parrot(tokenizer, {"story": ["the cat sat"], "other": ["nothing alike"]})
    data = [{"text": "story", "answer": "the cat sat"}, {"text": "other", "answer": "a b c"}]
    scores = TextSummarizationTask(model, tokenizer, data, *NAMES).run()
    assert scores == {name: {"r": 0.5, "p": 0.5, "f": 0.5} for name in scores}
    assert set(scores) == {"rouge-1", "rouge-2", "rouge-l"}
    assert set(model.asked) == {128}


@pytest.mark.parametrize("task", [LanguageModelingTask, TextSummarizationTask])
def test_a_real_model_runs_through(task: Any) -> None:
    data = [{"text": "a prompt", "answer": "an answer"}, {"text": "b", "answer": "c d"}]
    result = task(tiny_model(dtype=torch.float32), tiny_tokenizer(), data, *NAMES).run()
    assert result


def test_sampled_texts_of_a_real_model_are_voted_on() -> None:
    from transformers import GenerationConfig

    data = [{"text": "a prompt", "answer": "Positive"}] * 2
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    task = SequenceClassificationTask(model, tokenizer, CLASSES, data, *NAMES)
    result = task.run(GenerationConfig(do_sample=True, num_return_sequences=3, max_new_tokens=4))
    assert result["acc"] in (0, 0.5, 1)


def test_predictions_of_ids() -> None:
    tokenizer = tiny_tokenizer(with_bos=False)
    prompt = tokenizer("ab", return_tensors="pt")["input_ids"]
    outputs = torch.tensor([tokenizer("abyes")["input_ids"], tokenizer("abno ")["input_ids"]])
    both = prompt.repeat(2, 1)
    assert get_predictions(both, outputs, 1, tokenizer, ["no", "yes"]) == [1, 0]
    assert get_predictions(prompt, outputs, 2, tokenizer, ["no", "yes"]) == [1]


CLOSEST = [("yes", 1), (" YES ", 1), ("n", 0), ("yeah", 1), ("maybe not", 2), ("", 0)]


@pytest.mark.parametrize(("text", "index"), CLOSEST)
def test_the_closest_class_takes_the_fewest_edits(text: str, index: int) -> None:
    assert closest_class(text, ["no", "Yes", "maybe"]) == index


ROUGE = {
    "same": ("a b c", "a b c", (1, 1, 1)),
    "none": ("a b", "c d", (0, 0, 0)),
    "order": ("a b c d", "d c b a", (1, 0, 1 / 4)),
    "gap": ("a x b", "a b", (4 / 5, 0, 4 / 5)),
    "repeated": ("a a a", "a b c", (1 / 3, 0, 1 / 3)),
    "empty": ("", "a b", (0, 0, 0)),
}


@pytest.mark.parametrize(("summary", "reference", "wanted"), ROUGE.values(), ids=ROUGE)
def test_rouge_by_hand(summary: str, reference: str, wanted: tuple[float, ...]) -> None:
    scores = rouge([summary], [reference])
    assert [score["f"] for score in scores.values()] == pytest.approx(list(wanted))


def test_rouge_agrees_with_google_s() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is not installed")
    texts = "the cat sat on the mat", "on the mat sat the black cat and the dog"
    theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(texts[1], texts[0])
    for ours, other in zip(rouge([texts[0]], [texts[1]]).values(), theirs.values(), strict=True):
        assert ours == pytest.approx({"r": other.recall, "p": other.precision, "f": other.fmeasure})
