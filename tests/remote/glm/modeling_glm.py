"""`transformer.encoder.layers`, hidden states [tokens, rows, size], grouped keys."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_glm import GLMConfig

HEADS, GROUPS = 4, 2


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = config.hidden_size // HEADS
        self.query_key_value = nn.Linear(config.hidden_size, (HEADS + 2 * GROUPS) * self.size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        tokens, rows, _ = hidden_states.shape
        mixed = self.query_key_value(hidden_states).view(tokens, rows, -1, self.size)
        query, key, value = mixed.split([HEADS, GROUPS, GROUPS], dim=2)
        key = key + rotary_pos_emb.to(key.dtype)
        if kv_cache is not None:
            key = torch.cat((kv_cache[0], key))
            value = torch.cat((kv_cache[1], value))
        cache = (key, value) if use_cache else None
        key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
        scores = torch.einsum("tbhd,sbhd->bhts", query, key) / self.size**0.5
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask, torch.finfo(scores.dtype).min)
        out = torch.einsum("bhts,sbhd->tbhd", scores.softmax(-1), value)
        return self.dense(out.reshape(tokens, rows, -1)), cache


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 192, bias=False)
        self.dense_4h_to_h = nn.Linear(96, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        mixed, kv_cache = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask,
            rotary_pos_emb,
            kv_cache=kv_cache,
            use_cache=use_cache,
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kv_cache


class GLMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, hidden_states, attention_mask, rotary_pos_emb, kv_caches=None, use_cache=True
    ):
        kv_caches = kv_caches or [None] * len(self.layers)
        presents = ()
        for index, layer in enumerate(self.layers):
            hidden_states, kv_cache = layer(
                hidden_states,
                attention_mask,
                rotary_pos_emb,
                kv_cache=kv_caches[index],
                use_cache=use_cache,
            )
            presents = (*presents, kv_cache) if use_cache else presents
        return self.final_layernorm(hidden_states), presents


class GLMPreTrainedModel(PreTrainedModel):
    config_class = GLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module):
        """Leave everything as torch makes it."""


class GLMModel(GLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        before = 0 if past_key_values is None else past_key_values[0][0].shape[0]
        tokens = input_ids.shape[1]
        late = torch.ones(tokens, before + tokens, dtype=torch.bool, device=input_ids.device)
        mask = late.triu(before + 1)[None, None]
        if attention_mask is not None and not attention_mask.all():
            mask = mask | (attention_mask == 0)[:, None, None]
        positions = torch.arange(before, before + tokens, device=input_ids.device)
        rotary = torch.sin(positions)[:, None, None, None]
        hidden_states = self.embedding(input_ids).transpose(0, 1).contiguous()
        return self.encoder(hidden_states, mask, rotary, past_key_values, bool(use_cache))


class GLMForConditionalGeneration(GLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = GLMModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        hidden_states, presents = self.transformer(
            input_ids, attention_mask, past_key_values, use_cache
        )
        logits = self.transformer.output_layer(hidden_states).transpose(0, 1).contiguous()
        return CausalLMOutputWithPast(logits=logits, past_key_values=presents)
