"""Configurations of any type that transformers has, every size in them made small."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 256
_HEAD = 16  # size of an attention head
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
    for name, value in _BY_TYPE.get(model_type, {}).items():
        if isinstance(value, dict) and isinstance(overrides.get(name), dict):
            overrides[name] |= value
        else:
            overrides[name] = value
    return AutoConfig.for_model(model_type, **overrides | extra)


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
            (name.endswith("_config") and name != "per_layer_config") or name in ("text", "vision")
        ):
            nested = _shrunk(value)
            kept = {k: v for k, v in value.items() if k in ("model_type",)}
            changed[name] = kept | nested
        elif isinstance(value, dict) and "mrope_section" in value:
            share = value.get("partial_rotary_factor", settings.get("partial_rotary_factor") or 1)
            changed[name] = value | {
                "mrope_section": _scaled(value["mrope_section"], int(_HEAD * share / 2))
            }
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
    kinds = list(dict.fromkeys(settings.get("layer_types") or ()))
    if len(kinds) > 1 and "num_hidden_layers" in changed:  # one block of each kind
        changed |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return changed


def _scaled(parts: list[int], whole: int) -> list[int]:
    """Make parts smaller so that they add up to another whole."""
    small = [part * whole // sum(parts) for part in parts]
    return [*small[:-1], whole - sum(small[:-1])]


# What the rules above cannot know.
_MLA = {"num_key_value_heads": 4}
_QWEN4 = {"indexer_budget": 32, "indexer_compress_ratio": 8, "indexer_n_heads": 2} | {
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": None,
    },
}
_NEMOTRON_H = {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 32}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_DOTS3 = (
    _MLA
    | {f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")}
    | {f"swa_{name}": 32 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")}
    | {f"swa_{name}": 16 for name in ("qk_nope_head_dim", "v_head_dim")}
    | {"layer_types": ["indexed_attention", "sliding_attention"], "head_dim": 32}
    | {"index_n_heads": 2, "index_head_dim": 16, "n_routed_experts": 4, "rope_parameters": None}
    | {"mlp_layer_types": ["dense", "sparse"], "index_topk": 8}
)
_BY_TYPE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ),
        _MLA,
    ),
    "bailing_hybrid": _MLA,
    "kimi_linear": _MLA,
    "deepseek_v2": _MLA | {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": _NEMOTRON_H,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": _COMPASS,
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "rwkv": {"rescale_every": 0},  # otherwise it divides its weights, which packed ones refuse
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "longcat_flash": _MLA | {"qk_head_dim": 32},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "cpmant": {"init_std": 0.1},  # 1 makes a softmax so hot that rounding decides
    "dots3_note_text": _DOTS3,
    **{
        name: {"text_config": {"rope_parameters": _MROPE}}
        for name in [
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_vl",
            "qwen2_vl",
        ]
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        }
    },
    "gemma3": {"mm_tokens_per_image": 4},
    **{key: {"vocabulary_map": {"<image>": VOCABULARY - 1}} for key in ("chameleon", "emu3")},
    **{
        key: {"vision_start_token_id": 250}
        for key in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    },
    "cohere_compass": {"text_config": _COMPASS},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [3, 3, 2],
            }
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm5_next": {"text_config": _MLA},
    "granite4_vision": {"deepstack_layer_map": []},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": _MROPE}},
    "mistral4": _MLA
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 0.5,
        }
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemo_speechlm": {"text_config": _NEMOTRON_H},
    "nemotron_h_omni": {
        "text_config": _NEMOTRON_H,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "kimi_k25": {"text_config": _MLA},
    "mistral_large4": {"text_config": _MLA},
}
