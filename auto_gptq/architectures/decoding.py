"""Models whose blocks have Llama's shape, so that the decoding loop can run them by itself.

Such a block adds attention over its normed input to the input, and a gated MLP over the normed sum
to the sum; norms are RMS norms without offset, positions are rotations. Adding a model means a line
in ``LLAMA_SHAPED``; ``tests/generation`` then holds it to transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockParts:
    """Dotted names of a block's parts, relative to the block.

    :param qkv: the linears of queries, keys and values, or the one that makes all three
    :param gate_up: the linears of the gated MLP's two halves, or the one that makes both
    :param head_norms: the norms of each query and of each key head, if there are any
    """

    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    head_norms: tuple[str, ...] = ()
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


_LLAMA = BlockParts()

LLAMA_SHAPED: Mapping[str, BlockParts] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": BlockParts(head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "phi3": BlockParts(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
}
