"""Two-block random models, small enough to quantize in a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 256

# One model type per row of the architecture table that the installed transformers can build, with
# the settings that make it tiny.
_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}
TINY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"num_key_value_heads": 2},
    "mistral": _LLAMA | {"num_key_value_heads": 2},
    "qwen2": _LLAMA | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 16},
    "qwen3": _LLAMA | {"num_key_value_heads": 2, "head_dim": 32},
    "gemma": _LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": _LLAMA | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "cohere": _LLAMA | {"num_key_value_heads": 2},
    "phi3": _LLAMA | {"num_key_value_heads": 2, "pad_token_id": 0},
    "starcoder2": _LLAMA | {"num_key_value_heads": 2},
    "phi": _LLAMA,
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 128,
    },
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _GPT | {"rotary_dim": 8},
    "codegen": _GPT | {"rotary_dim": 8},
    "gpt_neox": _LLAMA,
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
}


def tiny_model(model_type: str = "llama", dtype: torch.dtype = torch.float16, **extra: Any) -> Any:
    """Build a random model; the weights depend on the test's seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = TINY[model_type] | {"vocab_size": VOCABULARY} | extra
    if "n_layer" not in settings and "n_layers" not in settings:
        settings.setdefault("num_hidden_layers", 2)
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_examples(
    count: int = 6, length: int = 32, vocabulary: int = VOCABULARY
) -> list[dict[str, Tensor]]:
    """Random token ids in the form that ``quantize`` takes."""
    rows = torch.randint(2, vocabulary, (count, length))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


# Of the largest logit: CPU kernels round activations to 15 bits, by 3e-5 of the largest each, and a
# misread tensor makes a difference a thousand times as large.
MOST = 5e-4


def assert_same_logits(found: Tensor, wanted: Tensor) -> None:
    """Compare what packed and dense weights compute in fp32."""
    missed = (found - wanted).abs().max() / wanted.abs().max()
    assert missed <= MOST, f"they differ by {missed:.1e} of the largest"
