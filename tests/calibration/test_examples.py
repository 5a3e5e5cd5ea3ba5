from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_gptq.calibration.examples import make_batches
from auto_gptq.errors import ExampleKeyError, ExamplesError


def _example(ids: Any, mask: Any = None) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids) if mask is None else mask}


FORMS: list[Callable[[list[int]], Any]] = [
    lambda ids: ids,
    torch.tensor,
    lambda ids: torch.tensor([ids]),
    lambda ids: torch.tensor([ids], dtype=torch.int32),
]


@pytest.mark.parametrize("form", FORMS, ids=["list", "1-D", "2-D", "int32"])
def test_every_form_of_one_example_gives_the_same_batch(form: Any) -> None:
    example = {"input_ids": form([5, 6, 7]), "attention_mask": form([1, 1, 1]), "labels": "dropped"}
    (batch,) = make_batches([example])
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64


def test_batches_keep_the_order_and_pad_on_the_left() -> None:
    batches = make_batches(
        [_example([1, 2, 3]), _example([4]), _example([5, 6])], 2, pad_token_id=9
    )
    assert batches[0].input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batches[0].attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batches[1].input_ids.tolist() == [[5, 6]]
    assert [batch.tokens for batch in batches] == [4, 2]


def test_a_two_dimensional_example_counts_as_its_rows() -> None:
    rows = torch.arange(6).view(2, 3)
    (batch,) = make_batches([{"input_ids": rows, "attention_mask": torch.ones_like(rows)}])
    assert batch.input_ids.shape == (2, 3)


BAD: dict[str, tuple[Any, str]] = {
    "empty": ([], "examples is empty"),
    "text": ("some text", "examples is a str.*tokenizer"),
    "one dict": (_example([1]), "examples is a dict"),
    "list of text": (["some text"], r"examples\[0\] is a str"),
    "empty example": ([_example([1]), _example([])], r"examples\[1\]"),
    "all masked": ([_example([1, 2], [0, 0])], r"examples\[0\] has no token"),
    "unequal lengths": ([_example([1, 2, 3], [1, 1])], r"shape \[1, 3\] and .* \[1, 2\]"),
    "ragged": ([{"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}], "different length"),
    "floats": ([_example(torch.rand(4), torch.ones(4))], "dtype torch.float32"),
    "3-D": ([_example(torch.ones(1, 2, 3).long(), torch.ones(1, 2, 3).long())], "3 dimensions"),
    "text ids": ([_example(["a", "b"])], "cannot be made a tensor"),
    "negative id": ([_example([1, -1])], "from -1 to 1"),
    "id too large": ([_example([1, 300])], "from 1 to 300.*0 to 255"),
}


@pytest.mark.parametrize(("examples", "message"), BAD.values(), ids=BAD.keys())
def test_bad_examples_are_named(examples: Any, message: str) -> None:
    with pytest.raises(ExamplesError, match=f"(?s){message}"):
        make_batches(examples, vocab_size=256)


def test_a_missing_key_is_a_key_error_too() -> None:
    with pytest.raises(KeyError) as caught:
        make_batches([_example([1]), {"input_ids": [1], "mask": [1]}])
    assert isinstance(caught.value, ExampleKeyError)
    assert str(caught.value).startswith("examples[1] has no `attention_mask`; it has ['input_ids'")


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ExamplesError, match="batch_size is 0"):
        make_batches([_example([1])], 0)
