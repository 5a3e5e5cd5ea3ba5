"""The 28 model classes: AutoGPTQ's attributes, from rows of the architecture table."""

from __future__ import annotations

import pytest

from auto_gptq.architectures import ARCHITECTURES, Architecture
from auto_gptq.modeling import GPTQ_CAUSAL_LM_MODEL_MAP, _const, wrappers

KVQ = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]
L1 = [KVQ, ["self_attn.o_proj"], ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]
GPT = [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
CODEGEN = [["attn.qkv_proj"], ["attn.out_proj"], ["mlp.fc_in"], ["mlp.fc_out"]]
BLOOM = [
    ["self_attention.query_key_value"],
    ["self_attention.dense"],
    ["mlp.dense_h_to_4h"],
    ["mlp.dense_4h_to_h"],
]
MOE = "block_sparse_moe.experts"
# From section 4 of the contract: type → block class, list of blocks, steps.
AUTOGPTQ = {
    "llama": ("LlamaDecoderLayer", "model.layers", L1),
    "longllama": ("LongLlamaDecoderLayer", "model.layers", L1),
    "mistral": ("MistralDecoderLayer", "model.layers", L1),
    "mixtral": (
        "MixtralDecoderLayer",
        "model.layers",
        [
            KVQ,
            ["self_attn.o_proj"],
            [f"{MOE}.{i}.{w}" for w in ("w1", "w3") for i in range(8)],
            [f"{MOE}.{i}.w2" for i in range(8)],
        ],
    ),
    "qwen2": ("Qwen2DecoderLayer", "model.layers", L1),
    "Yi": ("YiDecoderLayer", "model.layers", L1),
    "xverse": ("XverseDecoderLayer", "model.layers", L1),
    "deci": ("DeciLMDecoderLayer", "model.layers", L1),
    "stablelm_epoch": ("DecoderLayer", "model.layers", L1),
    "internlm": ("InternLMDecoderLayer", "model.layers", L1),
    "gemma": ("GemmaDecoderLayer", "model.layers", L1),
    "gemma2": ("Gemma2DecoderLayer", "model.layers", L1),
    "cohere": ("CohereDecoderLayer", "model.layers", L1),
    "starcoder2": (
        "Starcoder2DecoderLayer",
        "model.layers",
        [KVQ, ["self_attn.o_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    ),
    "baichuan": (
        "DecoderLayer",
        "model.layers",
        [
            ["self_attn.W_pack"],
            ["self_attn.o_proj"],
            ["mlp.up_proj", "mlp.gate_proj"],
            ["mlp.down_proj"],
        ],
    ),
    "minicpm3": (
        "MiniCPM3DecoderLayer",
        "model.layers",
        [
            ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"],
            ["self_attn.q_b_proj", "self_attn.kv_b_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ],
    ),
    # AutoGPTQ solves q, k and v one after another; they read the same input.
    "phi": (
        "PhiDecoderLayer",
        "model.layers",
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.dense"],
            ["mlp.fc1"],
            ["mlp.fc2"],
        ],
    ),
    "qwen": (
        "QWenBlock",
        "transformer.h",
        [["attn.c_attn"], ["attn.c_proj"], ["mlp.w1", "mlp.w2"], ["mlp.c_proj"]],
    ),
    "gpt2": ("GPT2Block", "transformer.h", GPT),
    "gpt_bigcode": ("GPTBigCodeBlock", "transformer.h", GPT),
    "gptj": (
        "GPTJBlock",
        "transformer.h",
        [
            ["attn.k_proj", "attn.v_proj", "attn.q_proj"],
            ["attn.out_proj"],
            ["mlp.fc_in"],
            ["mlp.fc_out"],
        ],
    ),
    "codegen": ("CodeGenBlock", "transformer.h", CODEGEN),
    "moss": ("MossBlock", "transformer.h", CODEGEN),
    "gpt_neox": (
        "GPTNeoXLayer",
        "gpt_neox.layers",
        [
            ["attention.query_key_value"],
            ["attention.dense"],
            ["mlp.dense_h_to_4h"],
            ["mlp.dense_4h_to_h"],
        ],
    ),
    "bloom": ("BloomBlock", "transformer.h", BLOOM),
    "RefinedWebModel": ("DecoderLayer", "transformer.h", BLOOM),
    "RefinedWeb": ("DecoderLayer", "transformer.h", BLOOM),
    "falcon": ("DecoderLayer", "transformer.h", BLOOM),
    "opt": (
        "OPTDecoderLayer",
        "model.decoder.layers",
        [KVQ, ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    ),
    # AutoGPTQ says MPTBlock, the name before transformers had the model.
    "mpt": (
        "MptBlock",
        "transformer.blocks",
        [["attn.Wqkv"], ["attn.out_proj"], ["ffn.up_proj"], ["ffn.down_proj"]],
    ),
}


def test_the_map_has_autogptqs_thirty_keys_and_28_classes() -> None:
    assert set(AUTOGPTQ) <= set(GPTQ_CAUSAL_LM_MODEL_MAP)
    assert len(AUTOGPTQ) == 30
    assert len(set(wrappers.BY_MODEL_TYPE.values())) == 28
    assert set(AUTOGPTQ) <= set(_const.SUPPORTED_MODELS)


@pytest.mark.parametrize(("model_type", "row"), AUTOGPTQ.items(), ids=AUTOGPTQ)
def test_class_attributes_are_autogptqs(
    model_type: str, row: tuple[str, str, list[list[str]]]
) -> None:
    cls = GPTQ_CAUSAL_LM_MODEL_MAP[model_type]
    assert (cls.layer_type, cls.layers_block_name, cls.inside_layer_modules) == row
    assert isinstance(cls.outside_layer_modules, list)
    assert cls.lm_head_name == ("embed_out" if model_type == "gpt_neox" else "lm_head")
    fused = {"llama", "longllama", "Yi", "xverse", "deci", "stablelm_epoch"}
    assert (cls.fused_mlp_module_type is not None) == (model_type in fused)
    assert (cls.fused_attn_module_type is not None) == (model_type in fused | {"gptj"})


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: next(iter(row.block_classes)))
def test_rows_and_class_attributes_are_inverse(row: Architecture) -> None:
    for model_type, block_class in row.block_classes.items():
        attributes = row.as_class_attributes(model_type)
        back = Architecture.from_class_attributes(type("Old", (), attributes), model_type)
        assert back.as_class_attributes(model_type) == attributes
        assert back == Architecture(
            {model_type: block_class}, row.blocks, row.around, row.steps, row.head
        )
