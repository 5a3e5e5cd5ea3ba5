"""A tiny random model of any type that transformers has, made by shrinking its configuration."""

from __future__ import annotations

import re
from typing import Any

import torch

VOCABULARY = 256
# What a setting becomes, by its name; the first pattern that matches whole decides.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|.*_vocab_size|n_vocab|vocab_size_.*", VOCABULARY),
    (r"(num_|n_)?(hidden_|decoder_|encoder_|text_|h_|l_|main_)?(layers?|blocks?)", 2),
    (r"num_hidden_layers|num_layers|n_layers?|.*num_.*layers|depth|.*_layers_num|.*_depth", 2),
    (r"num_nextn_predict_layers|num_mtp.*|.*num_predict.*", 0),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r".*(num|n)_(local_|routed_|total_)?experts|num_moe_experts|moe_num_experts", 4),
    (
        r".*num_experts_per_tok|.*experts_per_token|moe_k|moe_top_?k|top_k_experts|.*num_selected_experts",
        2,
    ),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_groups?|.*_group_num", 1),
    (r".*num_key_value_heads|.*num_kv_heads|.*_num_kv_heads|n_kv_heads?|num_query_groups", 2),
    (r".*(num_attention_heads|attention_heads|n_heads?|num_heads|n_head)", 4),
    (r"q_lora_rank|kv_lora_rank|.*_lora_rank|.*lora_rank", 32),
    (
        r".*qk_rope_head_dim|.*qk_nope_head_dim|.*v_head_dim|.*head_dim|.*head_size|d_kv|.*_head_dim_.*",
        16,
    ),
    (r"rotary_dim", 8),
    (
        r".*intermediate_size|.*intermediate_dim|.*ffn_dim|ffn_hidden_size|.*ffn_hidden_size|d_ff|n_inner|.*ffn_size|d_inner|mlp_dim|.*expert_dim",
        96,
    ),
    (
        r".*max_position_embeddings|max_seq_len|n_positions|seq_length|max_sequence_length|max_target_positions|n_ctx|.*context_length",
        128,
    ),
    (r"sliding_window|.*window_size|local_attention|window", 16),
    (
        r".*hidden_size.*|d_model|n_embd|.*hidden_dim|dim|.*embed_dim|.*emb_dim|dim_model|.*_dim_model|.*word_embed_proj_dim|embedding_size|.*_latent_size",
        64,
    ),
    (r"image_size|.*_image_size|img_size", 32),
    (r"patch_size", 16),
)
_KEPT = re.compile(r".*token_id|.*_index|pad_.*|.*_id")


def tiny_config(model_type: str, **extra: Any) -> Any:
    """Give the configuration of a model type, every size in it made small."""
    from transformers import AutoConfig

    overrides = _shrunk(AutoConfig.for_model(model_type).to_dict())
    return AutoConfig.for_model(model_type, **overrides | _BY_TYPE.get(model_type, {}) | extra)


def tiny_of(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """Build a random model of any type that can be a causal language model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype).eval()


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """Give the settings that change, nested ones whole."""
    changed: dict[str, Any] = {}
    layers = next(
        (
            settings[k]
            for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if isinstance(settings.get(k), int)
        ),
        None,
    )
    for name, value in settings.items():
        if isinstance(value, dict) and (
            name.endswith("_config") or name in ("attn_config", "ffn_config", "text", "vision")
        ):
            nested = _shrunk(value)
            kept = {k: v for k, v in value.items() if k in ("model_type",)}
            changed[name] = kept | nested
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and not _KEPT.fullmatch(name):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and value > 0:
                changed[name] = min(size, value) if size > 0 else 0
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            changed[name] = VOCABULARY - 1
        elif isinstance(value, list) and layers and len(value) == layers and name != "layer_types":
            changed[name] = value[:2]
    for name, value in settings.items():
        if name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            changed[name] = VOCABULARY - 1
    return changed


# What the rules above cannot know.
_BY_TYPE: dict[str, dict[str, Any]] = {}
