"""The model card: what it says, and that its metadata is what the Hub reads."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling.card import MARK, CardFacts, model_card


def _card(settings: dict[str, Any], **facts: Any) -> tuple[dict[str, Any], str]:
    text = model_card(BaseQuantizeConfig(**settings), CardFacts("me/tiny-4bit", **facts))
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_says_what_is_known() -> None:
    head, body = _card(
        {"group_size": 128, "desc_act": False, "lm_head": True, "dynamic": {"-:a|b": {}}},
        base_model="org/model",
        calibration_rows=128,
        calibration_tokens=65536,
        perplexity={"wikitext2": 5.5555},
    )
    assert head == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "auto-gptq", "quantized", "4-bit"],
    }
    for line in (
        MARK,
        "# tiny-4bit",
        "| bits | 4 |",
        "| group size | 128 |",
        "| zero point | symmetric |",
        "| format | gptq |",
        "| output head | quantized |",
        "| settings of their own | `-:a\\|b` |",
        "| calibration | 128 rows, 65,536 tokens |",
        "| perplexity, wikitext2 | 5.556 |",
        'model = AutoGPTQForCausalLM.from_quantized("me/tiny-4bit")',
        "vllm serve me/tiny-4bit",
    ):
        assert line in body.splitlines(), line


def test_a_card_is_silent_about_what_is_not_known() -> None:
    head, body = _card({})
    assert "base_model" not in head
    assert "calibration" not in body
    assert "perplexity" not in body


SERVABLE: dict[str, tuple[dict[str, Any], bool]] = {
    "defaults": ({}, True),
    "4 bits in groups": ({"group_size": 128, "desc_act": False}, True),
    "static groups": ({"group_size": 128, "static_groups": True}, True),
    "order in groups": ({"group_size": 128}, False),
    "3 bits": ({"bits": 3}, False),
    "asymmetric": ({"sym": False}, False),
    "odd group": ({"group_size": 48, "desc_act": False}, False),
}


@pytest.mark.parametrize(("settings", "expected"), SERVABLE.values(), ids=SERVABLE)
def test_a_card_offers_vllm_only_where_it_works(settings: dict[str, Any], expected: bool) -> None:
    _, body = _card(settings)
    assert ("vllm serve" in body) is expected
    assert ("vLLM does not run these settings" in body) is not expected
