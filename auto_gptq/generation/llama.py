"""Decoding of Llama-shaped models: a step is four products and four small operations a block."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures.decoding import LLAMA_SHAPED, BlockParts
from ..kernels import native
from ..kernels.decode_ops import decode_scratch
from ..nn_modules.fusion import Product, product
from ..nn_modules.qlinear.linear import QuantLinear

# Rotations whose angles do not depend on how long the sequence gets.
_ROTATIONS = ("default", "linear", "llama3", "yarn")
_GATES = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # → whether it is gelu
# What the kernels hold, in multiples of 8.
_MOST_CHANNELS = {"hidden_size": 1 << 14, "intermediate_size": 1 << 30}
_operators = torch.ops.auto_gptq


@dataclass(frozen=True)
class _Block:
    input_norm: Tensor  # [H]
    qkv: Product
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    attention_out: Product
    mlp_norm: Tensor  # [H]
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class _Room:
    """What grows with the batch and the number of tokens."""

    keys: Tensor  # [blocks, B, P, S, D]
    values: Tensor  # [blocks, B, P, S, D]
    cosine: Tensor  # [S, R]
    sine: Tensor  # [S, R]
    first: Tensor  # [B] int64
    scratch: tuple[Tensor, Tensor]


class LlamaDecoder:
    """A Llama-shaped model with a cache of fixed size."""

    def __init__(self, model: Any) -> None:
        native.load()  # a dense model has nothing else that would
        config, inner = model.config, model.model
        parts = LLAMA_SHAPED[config.model_type]
        attention = inner.layers[0].self_attn
        self._model = weakref.ref(model)  # sessions last as long as their models
        self._embedding: Tensor = inner.embed_tokens.weight
        self._blocks = [_read_block(block, parts) for block in inner.layers]
        self._norm: Tensor = inner.norm.weight
        self._head = _head(model.lm_head)
        self._rotary = inner.rotary_emb
        self._epsilon: float = config.rms_norm_eps
        self._gelu = _GATES[config.hidden_act]
        self._kv_heads: int = config.num_key_value_heads
        self._heads: int = config.num_attention_heads
        self._head_channels: int = attention.head_dim
        self._scale: float = attention.scaling
        self._room: _Room | None = None
        self.length = torch.zeros(1, dtype=torch.long, device=self._embedding.device)

    def reserve(self, batch: int, capacity: int) -> None:
        """Make room for so many tokens of so many rows; a cache that is large enough stays."""
        room = self._room
        if room is not None and room.keys.shape[1] == batch and room.keys.shape[3] >= capacity:
            return
        self._room = None  # free the old one first
        like, device = self._embedding, self._embedding.device
        shape = len(self._blocks), batch, self._kv_heads, capacity, self._head_channels
        cosine, sine = self._rotary(like, torch.arange(capacity, device=device)[None])
        self._room = _Room(
            keys=like.new_empty(shape),
            values=like.new_empty(shape),
            cosine=cosine[0].contiguous(),
            sine=sine[0].contiguous(),
            first=torch.zeros(batch, dtype=torch.long, device=device),
            scratch=decode_scratch(batch, self._heads, self._kv_heads, self._head_channels, device),
        )

    def prefill(self, prompt: Tensor, first: Tensor) -> Tensor:
        """Run the model over the prompts and take over what it has cached."""
        from transformers import DynamicCache

        room = self._reserved()
        place = torch.arange(prompt.shape[1], device=prompt.device)
        position = (place - first[:, None]).clamp(min=0)
        cache = DynamicCache()
        model: Any = self._model()
        output = model(
            input_ids=prompt,
            attention_mask=(place >= first[:, None]).long(),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        layers: list[Any] = cache.layers
        for i, layer in enumerate(layers):
            room.keys[i, :, :, : len(place)] = layer.keys
            room.values[i, :, :, : len(place)] = layer.values
        room.first.copy_(first)
        self.length.fill_(len(place))
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token ``[B]`` to each row; give the logits ``[B, V]``."""
        room = self._reserved()
        hidden = F.embedding(tokens, self._embedding)
        update = None
        for i, block in enumerate(self._blocks):
            normed = _operators.add_norm(hidden, update, block.input_norm, self._epsilon)
            attended = _operators.decode_attention(
                block.qkv(normed),
                room.cosine,
                room.sine,
                block.q_norm,
                block.k_norm,
                room.keys[i],
                room.values[i],
                self.length,
                room.first,
                *room.scratch,
                self._scale,
                self._epsilon,
            )
            update = block.attention_out(attended)
            normed = _operators.add_norm(hidden, update, block.mlp_norm, self._epsilon)
            update = block.down(_operators.gate(block.gate_up(normed), self._gelu))
        logits = self._head(_operators.add_norm(hidden, update, self._norm, self._epsilon))
        self.length += 1
        return logits

    def _reserved(self) -> _Room:
        assert self._room is not None
        return self._room


def _head(linear: nn.Module) -> Product:
    """Give the function from the last hidden states to the logits."""
    if type(linear) is not nn.Linear or linear.bias is not None:
        return product([linear])
    weight = linear.weight
    return lambda x: _operators.dense_matmul(x, weight)


def _read_block(block: nn.Module, parts: BlockParts) -> _Block:
    def weight(name: str) -> Tensor:
        tensor: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
        return tensor

    def linears(*names: str) -> Product:
        return product([block.get_submodule(name) for name in names])

    q_norm, k_norm = map(weight, parts.head_norms) if parts.head_norms else (None, None)
    return _Block(
        input_norm=weight(parts.input_norm),
        qkv=linears(*parts.qkv),
        q_norm=q_norm,
        k_norm=k_norm,
        attention_out=linears(parts.attention_out),
        mlp_norm=weight(parts.mlp_norm),
        gate_up=linears(*parts.gate_up),
        down=linears(parts.down),
    )


def find_misshape(model: Any) -> str | None:
    """Say why a model is none of those that can be decoded here at all, or None if it is one."""
    if (
        model.config.model_type in LLAMA_SHAPED
        and type(model).__module__.startswith("transformers.models.")
        and hasattr(model, "lm_head")
    ):
        return None
    return f"{type(model).__name__} is not among LLAMA_SHAPED"


def find_refusal(model: Any, most: int) -> str | None:
    """Say why a model of the right shape is not decoded here, or None if it is.

    :param most: tokens of a row in the end
    """
    parts = LLAMA_SHAPED[model.config.model_type]
    return next(_of_settings(model, most), None) or next(_of_modules(model, parts), None)


def _of_settings(model: Any, most: int) -> Iterator[str]:
    config = model.config
    if model.training:
        yield "the model is in training mode"
    if config.hidden_act not in _GATES:
        yield f"hidden_act is {config.hidden_act!r}"
    rotation = getattr(model.model.rotary_emb, "rope_type", None)
    if rotation not in _ROTATIONS:
        yield f"rope_type is {rotation!r}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < most and getattr(config, "use_sliding_window", True):
        yield f"the sliding window of {window} tokens is shorter than {most}"
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % 8 or getattr(config, name) > _MOST_CHANNELS[name]:
            yield f"{name} is {getattr(config, name)}"
    head_channels = model.model.layers[0].self_attn.head_dim
    if head_channels % 8 or head_channels > 256:
        yield f"attention heads have {head_channels} channels"


def _of_modules(model: Any, parts: BlockParts) -> Iterator[str]:
    if len({tensor.device for tensor in _tensors(model)}) != 1:
        yield "the model lies on several devices"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            yield f"{name} has hooks"
    names = (*parts.qkv, parts.attention_out, *parts.gate_up, parts.down)
    linears = [f"model.layers.{i}.{name}" for i in range(len(model.model.layers)) for name in names]
    for name in (*linears, "lm_head"):
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear and not isinstance(linear, QuantLinear):
            yield f"{name} is a {type(linear).__name__}"


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Give where the model's tensors lie: when that changes, a decoder must be made anew."""
    return tuple(tensor.data_ptr() for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
