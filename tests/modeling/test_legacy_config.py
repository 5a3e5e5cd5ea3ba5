"""config.json for transformers 4, judged by what its versions read (4.57), and read back by 5."""

from __future__ import annotations

import json
from typing import Any

import pytest

from auto_gptq.modeling.legacy_config import with_legacy_keys
from tests.tiny import TINY

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


def _rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 5e5} | more


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"model_type": "opt"}, {}),
        ({"dtype": "float16"}, {"torch_dtype": "float16"}),
        ({"dtype": None, "torch_dtype": "float32"}, {"torch_dtype": None}),
        ({"rope_parameters": _rope()}, {"rope_theta": 5e5, "rope_scaling": None}),
        ({"rope_parameters": None}, {}),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 1e4},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            {"rope_parameters": _rope(partial_rotary_factor=0.5), "model_type": "phi"},
            {"rope_theta": 5e5, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_parameters": _rope(partial_rotary_factor=0.25), "model_type": "gpt_neox"},
            {"rotary_emb_base": 5e5, "rope_scaling": None, "rotary_pct": 0.25},
        ),
        (
            {
                "model_type": "phi3",
                "rope_parameters": _rope(
                    "longrope", original_max_position_embeddings=4096, factor=32.0, **LONG
                ),
            },
            {"rope_theta": 5e5, "rope_scaling": {"type": "longrope"} | LONG},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ({"rope_parameters": {"chunked_attention": _rope()}}, {}),
        ({"model_type": "qwen3_moe", "num_local_experts": 128}, {"num_experts": 128}),
        ({"model_type": "mixtral", "num_local_experts": 8}, {}),
        ({"quantization_config": {"dtype": "x"}}, {}),
    ],
)
def test_old_keys_stand_beside_the_new_ones(config: dict[str, Any], added: dict[str, Any]) -> None:
    before = json.dumps(config)
    assert with_legacy_keys(config) == config | added
    assert json.dumps(config) == before
    nested = with_legacy_keys({"text_config": config, "name": 1})
    assert nested == {"text_config": config | added, "name": 1}


SCALED = {
    "llama with scaling": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": _rope(partial_rotary_factor=0.5)}),
    "gemma3": ("gemma3_text", {}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 16}),
    "gpt_oss": ("gpt_oss", {}),
} | {name: (name, settings) for name, settings in TINY.items()}


@pytest.mark.parametrize(("model_type", "settings"), SCALED.values(), ids=SCALED)
def test_transformers_5_reads_the_same_from_both(model_type: str, settings: dict[str, Any]) -> None:
    from transformers import AutoConfig

    long = {"max_position_embeddings": 131072} if "rope_parameters" in settings else {}
    config = AutoConfig.for_model(model_type, **settings, **long)
    before = json.loads(config.to_json_string(use_diff=False))
    after = AutoConfig.for_model(**with_legacy_keys(before))
    found = json.loads(after.to_json_string(use_diff=False))
    added = {key for key in found if key not in before}
    assert added <= {"partial_rotary_factor"}  # which phi3 keeps twice
    assert {key: found[key] for key in before} == before
