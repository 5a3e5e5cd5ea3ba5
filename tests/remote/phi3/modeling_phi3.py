"""Experts in a ModuleList beside fused q|k|v and gate|up, a tied head, an odd first block."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_phi3 import Phi3Config

EXPERTS = 4


class Phi3Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None):
        mixed = self.qkv_proj(hidden_states).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*mixed, attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Phi3MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 192, bias=False)
        self.down_proj = nn.Linear(96, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * nn.functional.silu(gate))


class Phi3SparseMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Phi3MLP(config) for _ in range(EXPERTS)])

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == number)
            if len(row):
                out.index_add_(0, row, expert(flat[row]) * weights[row, rank, None])
        return out.view_as(hidden_states)


class Phi3DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = Phi3Attention(config)
        self.mlp = Phi3SparseMLP(config) if layer_idx else Phi3MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None):
        mixed = self.self_attn(self.input_layernorm(hidden_states), attention_mask)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Phi3PreTrainedModel(PreTrainedModel):
    config_class = Phi3Config
    base_model_prefix = "model"
    _no_split_modules = ["Phi3DecoderLayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.1)


class Phi3Model(Phi3PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [Phi3DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, attention_mask=None):
        hidden_states = self.embed_tokens(input_ids)
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None] != 0)
            mask = mask | torch.eye(tokens, dtype=torch.bool, device=input_ids.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask)
        return self.norm(hidden_states)


class Phi3ForCausalLM(Phi3PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Phi3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, attention_mask)))
