"""`transformer.h`, fused q|k|v, `w1`/`w2` of a gated MLP, tuples, keys and values in tuples."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_qwen1 import Qwen1Config
from .rotary_qwen1 import rotated


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, layer_past=None, attention_mask=None, use_cache=False):
        rows, tokens, size = hidden_states.shape
        parts = self.c_attn(hidden_states).split(size, dim=2)
        query, key, value = (x.view(rows, tokens, self.heads, -1) for x in parts)
        before = 0 if layer_past is None else layer_past[0].shape[1]
        query, key = rotated(query, before), rotated(key, before)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=1)
            value = torch.cat((layer_past[1], value), dim=1)
        present = (key, value) if use_cache else None
        scores = torch.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
        late = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(before + 1)
        scores = scores.masked_fill(late, torch.finfo(scores.dtype).min)
        if attention_mask is not None:
            scores = scores + attention_mask
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)
        return self.c_proj(mixed.reshape(rows, tokens, size)), present


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, 96, bias=False)
        self.w2 = nn.Linear(config.hidden_size, 96, bias=False)
        self.c_proj = nn.Linear(96, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.c_proj(self.w1(hidden_states) * nn.functional.silu(self.w2(hidden_states)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden_states, layer_past=None, attention_mask=None, use_cache=False):
        mixed, present = self.attn(self.ln_1(hidden_states), layer_past, attention_mask, use_cache)
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class Qwen1PreTrainedModel(PreTrainedModel):
    config_class = Qwen1Config
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.1)
            if module.bias is not None:
                module.bias.data.zero_()


class Qwen1Model(Qwen1PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, past_key_values=None, attention_mask=None, use_cache=False):
        hidden_states = self.wte(input_ids)
        if past_key_values is None:
            past_key_values = (None,) * len(self.h)
        if attention_mask is not None:
            mask = attention_mask[:, None, None].to(hidden_states.dtype)
            attention_mask = (1 - mask) * torch.finfo(hidden_states.dtype).min
        presents = ()
        for block, layer_past in zip(self.h, past_key_values, strict=False):
            outputs = block(
                hidden_states,
                layer_past=layer_past,
                attention_mask=attention_mask,
                use_cache=use_cache,
            )
            hidden_states = outputs[0]
            if use_cache:
                presents = (*presents, outputs[1])
        return self.ln_f(hidden_states), presents or None


class Qwen1LMHeadModel(Qwen1PreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = Qwen1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        use_cache=False,
        return_dict=True,
    ):
        hidden_states, past = self.transformer(
            input_ids, past_key_values, attention_mask, use_cache
        )
        logits = self.lm_head(hidden_states)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past)
