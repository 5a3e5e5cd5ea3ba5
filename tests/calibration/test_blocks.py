from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_gptq.calibration.blocks import collate_data, get_dataloader, make_data_block
from tests.tiny_tokenizer import tiny_tokenizer

SAMPLES = {"prompt": ["long prompt", "ab", "abcd"], "label": ["x", "yes", "zz"]}
NAMES = ("prompt", "label")


def _text(tokenizer: Any, ids: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_a_block_holds_prompts_by_length_padded_on_the_left() -> None:
    tokenizer = tiny_tokenizer(with_bos=False)
    made = make_data_block(SAMPLES, *NAMES, tokenizer, block_max_len=12)
    assert [[_text(tokenizer, row) for row in block] for block in made["input_ids"]] == [
        ["<pad><pad>ab", "abcd"],
        ["long prompt"],
    ]
    assert made["attention_mask"][0] == [[0, 0, 1, 1], [1, 1, 1, 1]]
    label = tokenizer("yes")["input_ids"]
    assert made["labels"][0] == [label, [-100, *tokenizer("zz")["input_ids"]]]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("most", [1, 8, 20, 2048])
def test_no_block_is_longer_than_allowed_unless_one_sample_is(merge: bool, most: int) -> None:
    texts = ["a" * length for length in (9, 3, 5, 12, 3, 7)]
    made = make_data_block(
        {"prompt": texts, "label": texts},
        *NAMES,
        tiny_tokenizer(),
        block_max_len=most,
        merge_prompt_label=merge,
    )
    blocks = made["input_ids"]
    assert sum(len(block) for block in blocks) == 6
    assert all(len(block) == 1 or len(block) * len(block[0]) <= most for block in blocks)


def test_a_merged_sample_learns_its_label_only_and_ends() -> None:
    tokenizer = tiny_tokenizer()
    made = make_data_block(
        {"prompt": ["ab"], "label": ["yes"]},
        *NAMES,
        tokenizer,
        add_eos_token=True,
        merge_prompt_label=True,
    )
    assert _text(tokenizer, made["input_ids"][0][0]) == "<s>abyes</s>"  # one <s>, not two
    assert made["labels"][0][0][:3] == [-100] * 3
    assert made["labels"][0][0][3:] == made["input_ids"][0][0][3:]


CUTS = {
    "prompt": (5, True, [("efyes", "yes")]),
    "all of the prompt": (2, True, [("ye", "ye")]),
    "label": (8, False, [("abcdefye", "ye")]),
    "all of the label": (6, False, []),
}


@pytest.mark.parametrize(("length", "truncate_prompt", "wanted"), CUTS.values(), ids=CUTS)
def test_a_long_sample_is_cut(length: int, truncate_prompt: bool, wanted: Any) -> None:
    tokenizer = tiny_tokenizer(with_bos=False)
    made = make_data_block(
        {"prompt": ["abcdef"], "label": ["yes"]},
        *NAMES,
        tokenizer,
        sample_max_len=length,
        truncate_prompt=truncate_prompt,
        merge_prompt_label=True,
    )
    found = [
        (_text(tokenizer, ids), _text(tokenizer, [i for i in labels if i != -100]))
        for block, expected in zip(made["input_ids"], made["labels"], strict=True)
        for ids, labels in zip(block, expected, strict=True)
    ]
    assert found == wanted


def test_blocks_are_joined_padded_on_the_left() -> None:
    blocks = [
        {"input_ids": [[5, 6]], "attention_mask": [[1, 1]], "labels": [[7]]},
        {"input_ids": torch.tensor([[8]]), "attention_mask": [[1]], "labels": [[9, 9]]},
    ]
    batch = collate_data(blocks, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6], [3, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["labels"].tolist() == [[-100, 7], [9, 9]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def _rename(samples: Any, to: str = "prompt") -> Any:
    return {to: samples["question"], "label": samples["answer"]}


def test_a_loader_draws_samples_from_what_the_functions_give() -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    loader = get_dataloader(
        "somewhere",
        *NAMES,
        tiny_tokenizer(),
        load_fn=lambda path, count: {"train": rows[:2], "test": rows[:count]},
        load_fn_kwargs={"count": 10},
        preprocess_fn=_rename,
        preprocess_fn_kwargs={"to": "prompt"},
        num_samples=7,
        block_max_len=10,
    )
    batches = list(loader)
    assert sum(len(batch["input_ids"]) for batch in batches) == 7
    assert all(batch["input_ids"].shape == (3, 3) for batch in batches[:-1])


@pytest.mark.parametrize("form", ["rows", "columns", "Dataset", "file"])
def test_a_loader_needs_no_functions(form: str, tmp_path: Any) -> None:
    """AutoGPTQ crashed with preprocess_fn=None."""
    rows = [{"prompt": "ab", "label": "c"}] * 3
    columns = {"prompt": ["ab"] * 3, "label": ["c"] * 3}
    source: Any = {"rows": rows, "columns": columns}.get(form)
    if form == "file":
        source = tmp_path / "data.jsonl"
        source.write_text('{"prompt": "ab", "label": "c"}\n' * 3)
    if form == "Dataset":
        source = pytest.importorskip("datasets").Dataset.from_dict(columns)
    (batch,) = get_dataloader(source, *NAMES, tiny_tokenizer(with_pad=False))
    assert batch["input_ids"].shape == (3, 3)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="no column 'prompts'"):
        make_data_block(SAMPLES, "prompts", "label", tiny_tokenizer())
    with pytest.raises(ValueError, match="sample_max_len is 0"):
        make_data_block(SAMPLES, *NAMES, tiny_tokenizer(), sample_max_len=0)
    with pytest.raises(ValueError, match="None of 1 samples has a label"):
        get_dataloader([{"prompt": "ab", "label": ""}], *NAMES, tiny_tokenizer())
