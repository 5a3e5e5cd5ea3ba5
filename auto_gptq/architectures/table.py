"""The architecture table: one row per layout, not per model.

Adding a model whose blocks look like one of these means adding its model type to ``block_classes``.
"""

from __future__ import annotations

from .architecture import Architecture

_DECODER = ("model.embed_tokens", "model.norm")

LLAMA = Architecture(
    block_classes={
        "llama": "LlamaDecoderLayer",
        "mistral": "MistralDecoderLayer",
        "qwen2": "Qwen2DecoderLayer",
        "qwen3": "Qwen3DecoderLayer",
        "gemma": "GemmaDecoderLayer",
        "gemma2": "Gemma2DecoderLayer",
        "gemma3_text": "Gemma3DecoderLayer",
        "cohere": "CohereDecoderLayer",
        "cohere2": "Cohere2DecoderLayer",
        "granite": "GraniteDecoderLayer",
        "helium": "HeliumDecoderLayer",
        "olmo": "OlmoDecoderLayer",
        "olmo2": "Olmo2DecoderLayer",
        "smollm3": "SmolLM3DecoderLayer",
        "stablelm": "StableLmDecoderLayer",
        "stablelm_epoch": "DecoderLayer",
        "longllama": "LongLlamaDecoderLayer",
        "internlm": "InternLMDecoderLayer",
        "xverse": "XverseDecoderLayer",
        "deci": "DeciLMDecoderLayer",
        "Yi": "YiDecoderLayer",
    },
    blocks="model.layers",
    around=_DECODER,
    steps=(
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.up_proj mlp.gate_proj",
        "mlp.down_proj",
    ),
)

# As transformers 4 built it; transformers 5 keeps all experts of a block in one parameter.
MIXTRAL = Architecture(
    block_classes={"mixtral": "MixtralDecoderLayer"},
    blocks="model.layers",
    around=_DECODER,
    steps=(
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj",
        "self_attn.o_proj",
        " ".join(f"block_sparse_moe.experts.{i}.{w}" for w in ("w1", "w3") for i in range(8)),
        " ".join(f"block_sparse_moe.experts.{i}.w2" for i in range(8)),
    ),
)

PHI3 = Architecture(
    block_classes={"phi3": "Phi3DecoderLayer"},
    blocks="model.layers",
    around=_DECODER,
    steps=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
)

BAICHUAN = Architecture(
    block_classes={"baichuan": "DecoderLayer"},
    blocks="model.layers",
    around=_DECODER,
    steps=("self_attn.W_pack", "self_attn.o_proj", "mlp.up_proj mlp.gate_proj", "mlp.down_proj"),
)

STARCODER2 = Architecture(
    block_classes={"starcoder2": "Starcoder2DecoderLayer"},
    blocks="model.layers",
    around=_DECODER,
    steps=(
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ),
)

PHI = Architecture(
    block_classes={"phi": "PhiDecoderLayer"},
    blocks="model.layers",
    around=("model.embed_tokens", "model.final_layernorm"),
    steps=(
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
    ),
)

MINICPM3 = Architecture(
    block_classes={"minicpm3": "MiniCPM3DecoderLayer"},
    blocks="model.layers",
    around=("model.embed_tokens", "model.norm"),
    steps=(
        "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa",
        "self_attn.q_b_proj self_attn.kv_b_proj",
        "self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj",
        "mlp.down_proj",
    ),
)

OPT = Architecture(
    block_classes={"opt": "OPTDecoderLayer"},
    blocks="model.decoder.layers",
    around=(
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "model.decoder.project_out",
        "model.decoder.project_in",
        "model.decoder.final_layer_norm",
    ),
    steps=(
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ),
)

GPT2 = Architecture(
    block_classes={"gpt2": "GPT2Block", "gpt_bigcode": "GPTBigCodeBlock"},
    blocks="transformer.h",
    around=("transformer.wte", "transformer.wpe", "transformer.ln_f"),
    steps=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)

GPTJ = Architecture(
    block_classes={"gptj": "GPTJBlock"},
    blocks="transformer.h",
    around=("transformer.wte", "transformer.ln_f"),
    steps=("attn.k_proj attn.v_proj attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
)

CODEGEN = Architecture(
    block_classes={"codegen": "CodeGenBlock", "moss": "MossBlock"},
    blocks="transformer.h",
    around=("transformer.wte", "transformer.ln_f"),
    steps=("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
)

GPT_NEOX = Architecture(
    block_classes={"gpt_neox": "GPTNeoXLayer"},
    blocks="gpt_neox.layers",
    around=("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    steps=(
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    head="embed_out",
)

BLOOM = Architecture(
    block_classes={"bloom": "BloomBlock"},
    blocks="transformer.h",
    around=(
        "transformer.word_embeddings",
        "transformer.word_embeddings_layernorm",
        "transformer.ln_f",
    ),
    steps=(
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
)

FALCON = Architecture(
    block_classes={
        "falcon": "FalconDecoderLayer",
        "RefinedWeb": "DecoderLayer",
        "RefinedWebModel": "DecoderLayer",
    },
    blocks="transformer.h",
    around=("transformer.word_embeddings", "transformer.ln_f"),
    steps=BLOOM.steps,
)

MPT = Architecture(
    block_classes={"mpt": "MptBlock"},
    blocks="transformer.blocks",
    around=("transformer.wte", "transformer.norm_f"),
    steps=("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
)

QWEN = Architecture(
    block_classes={"qwen": "QWenBlock"},
    blocks="transformer.h",
    around=("transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.visual"),
    steps=("attn.c_attn", "attn.c_proj", "mlp.w1 mlp.w2", "mlp.c_proj"),
)

ARCHITECTURES = (
    LLAMA,
    MIXTRAL,
    PHI3,
    BAICHUAN,
    STARCODER2,
    PHI,
    MINICPM3,
    OPT,
    GPT2,
    GPTJ,
    CODEGEN,
    GPT_NEOX,
    BLOOM,
    FALCON,
    MPT,
    QWEN,
)
