"""The small operations between the products of a decoding step: schema, fake and plain version.

Letters: B rows, H hidden channels, Q query heads, P heads of keys and values, D channels of a head,
R of them rotated, S positions that the cache holds. ``csrc/cuda/decode.cu`` has the same for NVIDIA
GPUs, one kernel each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("auto_gptq", "FRAGMENT")

_MOST_SPLITS = 32


def _define(name: str, arguments: str, implementation: Any, result: str = "Tensor") -> None:
    _library.define(f"{name}({arguments}) -> {result}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide rows by their root mean square, in fp32, and multiply by a weight."""
    wide = x.to(torch.float32)
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * unit.to(x.dtype)


def add_norm(
    hidden: Tensor,  # [B, H]; the update is added in place
    update: Tensor | None,  # [B, H]
    weight: Tensor,  # [H]
    epsilon: float,
) -> Tensor:  # [B, H]
    """Add what a part of a block has computed, and norm the sum for the next part."""
    if update is not None:
        hidden.add_(update)
    return rms_norm(hidden, weight, epsilon)


def gate(gate_up: Tensor, gelu: bool) -> Tensor:  # [B, 2 * I] → [B, I]
    """Multiply the second half by silu, or tanh's gelu, of the first."""
    opening, up = gate_up.chunk(2, -1)
    opened = F.gelu(opening, approximate="tanh") if gelu else F.silu(opening)
    return opened * up


def dense_matmul(x: Tensor, weight: Tensor) -> Tensor:  # [B, K], [N, K] → [B, N]
    """Multiply by a dense weight; on the CPU, a few rows as fast as the weight can be read."""
    return F.linear(x, weight)


def decode_attention(
    qkv: Tensor,  # [B, (Q + 2 P) * D] queries, keys and values of the new tokens
    cosine: Tensor,  # [positions, R]
    sine: Tensor,  # [positions, R]
    q_norm: Tensor | None,  # [D] weight of an RMS norm over each query head
    k_norm: Tensor | None,  # [D]
    keys: Tensor,  # [B, P, S, D]; the new ones are put in
    values: Tensor,  # [B, P, S, D]; the new ones are put in
    length: Tensor,  # [1] int64, tokens that the cache holds so far
    first: Tensor,  # [B] int64, the place of a row's first token; what is before is padding
    partial: Tensor,  # scratch, see decode_scratch
    arrived: Tensor,  # scratch, see decode_scratch
    scale: float,
    epsilon: float,
) -> Tensor:  # [B, Q * D]
    """Rotate the new queries and keys, put keys and values into the cache and attend to it."""
    batch, kv_heads, _, channels = keys.shape
    heads = qkv.view(batch, -1, channels)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        query = rms_norm(query, q_norm, epsilon)
    if k_norm is not None:
        key = rms_norm(key, k_norm, epsilon)
    position = length - first
    angles = cosine[position].unsqueeze(1), sine[position].unsqueeze(1)  # [B, 1, R]
    keys.index_copy_(2, length, _rotated(key, *angles).unsqueeze(2))
    values.index_copy_(2, length, value.unsqueeze(2))
    place = torch.arange(keys.shape[2], device=keys.device)
    mask = (place >= first[:, None]) & (place <= length)
    if keys.device.type == "cpu":
        used = int(length) + 1
        keys, values, mask = keys[:, :, :used], values[:, :, :used], mask[:, :used]
    else:
        # Nobody may wait for the length to be known here.  What lies beyond it may be anything, and
        # a weight of 0 does not make it harmless: 0 times NaN is NaN.
        beyond = (place > length)[:, None]
        keys, values = keys.masked_fill(beyond, 0), values.masked_fill(beyond, 0)
    # Heads that share a key head are rows of one product: no key is copied.
    grouped = _rotated(query, *angles).view(batch, kv_heads, -1, channels)
    attended = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask[:, None, None], scale=scale
    )
    return attended.reshape(batch, -1)


def append_best(
    logits: Tensor,  # [B, V]
    tokens: Tensor,  # [B, S] int64; the new ones are put in
    length: Tensor,  # [1] int64, the place of the new ones
    ended: Tensor,  # [B] bool; rows that end are marked
    stops: Tensor | None,  # [*] int64: a row ends with one of these
    padding: int,
) -> None:
    """Put the token of the highest logit at the end of each row; padding where it has ended."""
    append(logits.argmax(-1), tokens, length, ended, stops, padding)


def append(
    chosen: Tensor,  # [B] int64
    tokens: Tensor,
    length: Tensor,
    ended: Tensor,
    stops: Tensor | None,
    padding: int,
) -> None:
    """Put chosen tokens at the end of each row; padding where it has ended."""
    if stops is not None:
        chosen = torch.where(ended, padding, chosen)
        ended |= torch.isin(chosen, stops)
    tokens.index_copy_(1, length, chosen[:, None])


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    turned, rest = x.split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], -1)
    low, high = turned.chunk(2, -1)
    turned = turned * cosine + torch.cat((-high, low), -1) * sine
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def decode_scratch(
    batch: int, heads: int, kv_heads: int, channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Make what decode_attention keeps its intermediate sums in; one for all blocks of a model."""
    splits = 1
    if device.type == "cuda":  # enough parts of the cache to give each multiprocessor two
        cores = torch.cuda.get_device_properties(device).multi_processor_count
        splits = max(1, min(_MOST_SPLITS, 2 * cores // (batch * kv_heads)))
    return (
        torch.zeros(batch, heads, splits, channels + 2, device=device),
        torch.zeros(batch * heads, dtype=torch.int32, device=device),
    )


_define("add_norm", "Tensor(a!) hidden, Tensor? update, Tensor weight, float epsilon", add_norm)
_define("gate", "Tensor gate_up, bool gelu", gate)
_define("dense_matmul", "Tensor x, Tensor weight", dense_matmul)
_define(
    "decode_attention",
    "Tensor qkv, Tensor cosine, Tensor sine, Tensor? q_norm, Tensor? k_norm, "
    "Tensor(a!) keys, Tensor(b!) values, Tensor length, Tensor first, "
    "Tensor(c!) partial, Tensor(d!) arrived, float scale, float epsilon",
    decode_attention,
)
_define(
    "append_best",
    "Tensor logits, Tensor(a!) tokens, Tensor length, Tensor(b!) ended, Tensor? stops, int padding",
    append_best,
    "()",
)


@torch.library.register_fake("auto_gptq::append_best", lib=_library)
def _(*_arguments: Any) -> None:
    return None


@torch.library.register_fake("auto_gptq::add_norm", lib=_library)
def _(hidden: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.register_fake("auto_gptq::gate", lib=_library)
def _(gate_up: Tensor, gelu: bool) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("auto_gptq::decode_attention", lib=_library)
def _(qkv: Tensor, *others: Any) -> Tensor:
    keys = others[4]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]))


@torch.library.register_fake("auto_gptq::dense_matmul", lib=_library)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
