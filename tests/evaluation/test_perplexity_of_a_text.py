from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq.evaluation.perplexity import Perplexity
from tests.tiny import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

ROWS = ["The first row.\n", "", "A second row that is longer.\n", "The end of it all, at last.\n"]
TEXT = "The first row.\n \nA second row that is longer.\nThe end of it all, at last.\n"
N_CTX = 16


def _in_double(model: Any, tokenizer: Any, n_ctx: int) -> list[float]:
    """Compute it the plain way, token by token, in fp64."""
    ids = tokenizer(TEXT)["input_ids"]
    surprise, found = [], []
    for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
        window = ids[start : start + n_ctx]
        seen = list(window)
        if tokenizer.bos_token_id is not None:
            seen[0] = tokenizer.bos_token_id
        logits = model(input_ids=torch.tensor([seen])).logits[0].double()
        for position in range(min(512, n_ctx // 2), n_ctx - 1):
            likelihoods = torch.log_softmax(logits[position], 0)
            surprise.append(-likelihoods[window[position + 1]].item())
        found.append(math.exp(sum(surprise) / len(surprise)))
    return found


@pytest.mark.parametrize("with_bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("n_batch", [1, 5, 8, N_CTX, 512])
def test_it_is_what_a_plain_computation_in_double_gives(with_bos: bool, n_batch: int) -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer(with_bos)
    data = [{"text": row} for row in ROWS]
    found = Perplexity(model, tokenizer, data).calculate_perplexity(N_CTX, n_batch)
    assert len(found) == 4
    assert found == pytest.approx(_in_double(model, tokenizer, N_CTX), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_weighed_in_single_precision(dtype: torch.dtype) -> None:
    """AutoGPTQ took the softmax in fp16, and could not do it in bf16.

    In fp32 the result differs from fp64 by fp32's 2^-24 per term, whatever the logits' dtype is.
    """
    model, tokenizer = tiny_model(dtype=dtype), tiny_tokenizer()
    found = Perplexity(model, tokenizer, {"text": ROWS}).calculate_perplexity(N_CTX)
    assert found == pytest.approx(_in_double(model, tokenizer, N_CTX), rel=1e-6)


def _as_text(folder: Path) -> Path:
    (folder / "data.txt").write_text(TEXT)
    return folder / "data.txt"


def _as_lines(folder: Path) -> Path:
    lines = "\n".join(json.dumps({"text": row}) for row in ROWS)
    (folder / "data.jsonl").write_text(lines)
    return folder / "data.jsonl"


def _as_list(folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    return folder / "data.json"


def _dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"text": ROWS, "other": ROWS})


def _as_parquet(folder: Path) -> Path:
    _dataset().to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def _as_splits(folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict(train=_dataset().select([0]), test=_dataset())


SOURCES = {
    "txt": lambda folder: str(_as_text(folder)),
    "jsonl": _as_lines,
    "json": _as_list,
    "parquet": _as_parquet,
    "Dataset": lambda folder: _dataset(),
    "DatasetDict": _as_splits,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_of_a_text_gives_the_same(source: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    wanted = Perplexity(model, tokenizer, {"text": ROWS}).calculate_perplexity(N_CTX)
    found = Perplexity(model, tokenizer, source(tmp_path)).calculate_perplexity(N_CTX)
    assert found == wanted


BAD: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "column": ({"text_column": "texts"}, {}, r"no column 'texts'; the data has \['text'\]"),
    "short": ({}, {"n_ctx": 512}, "tokens, fewer than one window of n_ctx=512"),
    "n_ctx": ({}, {"n_ctx": 2}, "n_ctx is 2 and n_batch 512"),
    "n_batch": ({}, {"n_batch": 0}, "n_batch 0"),
}


@pytest.mark.parametrize(("given", "run", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_named(given: Any, run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perplexity(tiny_model(), tiny_tokenizer(), {"text": ROWS}, **given).calculate_perplexity(
            **run
        )


def test_an_absent_split_is_named(tmp_path: Path) -> None:
    splits = _as_splits(tmp_path)
    with pytest.raises(ValueError, match=r"none of the splits \['dev'\]; the data has \['train'"):
        Perplexity(tiny_model(), tiny_tokenizer(), splits, split="dev")


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"bad\.json"):
        Perplexity(tiny_model(), tiny_tokenizer(), tmp_path / "bad.json")
