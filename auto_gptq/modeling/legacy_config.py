"""Add to a ``config.json`` of transformers 5 the keys that transformers 4 reads instead.

Without them transformers 4 takes its defaults and says nothing: a rotary base of 10000, no
scaling of long contexts, float32.  transformers 5 reads both spellings.
"""

from __future__ import annotations

from typing import Any

# Models whose keys in transformers 4 are not the usual ones: (our key, theirs).
_RENAMED = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
# Where the base of each kind of attention went, for models that have more than one.
_THETA_KEYS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
_TWO_BASES = {"gemma3_text", "gemma3n_text"}
# Phi-3's configuration in transformers 4 refuses a scaling with any other key.
_LONGROPE_KEYS = ("short_factor", "long_factor")


def with_legacy_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Give a copy of a model configuration with the old keys beside the new ones.

    Where both are there the new key decides.  Nested configurations are treated alike.
    """
    result = {
        key: with_legacy_keys(value)
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
    added = _legacy_rope(config)
    if "dtype" in config:
        added["torch_dtype"] = config["dtype"]
    for key, old_key in _RENAMED.get(str(config.get("model_type")), {}).items():
        if key in added or key in config:
            added[old_key] = added.pop(key, config.get(key))
    return result | added


def _legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    rope, model_type = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, dict) or not rope:
        return {}
    if set(rope) == set(_THETA_KEYS) and model_type in _TWO_BASES:
        thetas = {key: rope[kind]["rope_theta"] for kind, key in _THETA_KEYS.items()}
        return _one_rope(rope["full_attention"], model_type) | thetas
    if any(value is None or isinstance(value, dict) for value in rope.values()):
        return {}  # kinds of attention that transformers 4 did not know
    return _one_rope(rope, model_type)


def _one_rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    apart = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return apart | {"rope_scaling": None}
    scaling = {key: value for key, value in rope.items() if key not in apart}
    if model_type == "phi3":
        scaling = {"type": kind} | {key: rope[key] for key in _LONGROPE_KEYS if key in rope}
    return apart | {"rope_scaling": scaling}
