"""AutoGPTQ's classes, one per kind of model, made from the rows of the architecture table."""

from __future__ import annotations

from .._old_names import MODEL_FILES
from ..architectures import find
from ..nn_modules.retired import CLASSES
from ._base import BaseGPTQForCausalLM

# What these name in AutoGPTQ rewrote forward methods of 2023; here they are only names.
_FUSED_ATTENTION = {
    "GPTJGPTQForCausalLM": CLASSES["FusedGPTJAttentionForQuantizedModel"],
    **dict.fromkeys(
        (
            "DeciLMGPTQForCausalLM",
            "LlamaGPTQForCausalLM",
            "LongLlamaGPTQForCausalLM",
            "StableLMEpochGPTQForCausalLM",
            "XverseGPTQForCausalLM",
            "YiGPTQForCausalLM",
        ),
        CLASSES["FusedLlamaAttentionForQuantizedModel"],
    ),
}


def _make(name: str, model_type: str) -> type[BaseGPTQForCausalLM]:
    attention = _FUSED_ATTENTION.get(name)
    mlp = CLASSES["FusedLlamaMLPForQuantizedModel"] if attention and "GPTJ" not in name else None
    attributes = find(model_type).as_class_attributes(model_type) | {
        "__doc__": f"AutoGPTQ's class for the model type ``{model_type}``.",
        "__module__": __name__,
        "fused_attn_module_type": attention,
        "fused_mlp_module_type": mlp,
    }
    return type(name, (BaseGPTQForCausalLM,), attributes)


BY_MODEL_TYPE: dict[str, type[BaseGPTQForCausalLM]] = {}
for _row in MODEL_FILES.values():
    _name, *_types = _row.split()
    globals()[_name] = _class = _make(_name, _types[0])
    BY_MODEL_TYPE.update(dict.fromkeys(_types, _class))
