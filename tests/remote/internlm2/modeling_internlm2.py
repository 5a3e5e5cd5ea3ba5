"""`attention.wqkv`, `feed_forward.w1/w3/w2`, a head called `output`, everything by position."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_internlm2 import InternLM2Config


class InternLM2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wqkv = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None):
        rows, tokens, _ = hidden_states.shape
        # Each of 2 groups holds 2 queries, one key and one value.
        groups = self.wqkv(hidden_states).view(rows, tokens, 2, 4, 16)
        query = groups[..., :2, :].flatten(2, 3).transpose(1, 2)
        key, value = (groups[..., i, :].repeat_interleave(2, dim=2).transpose(1, 2) for i in (2, 3))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class InternLM2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, 96, bias=False)
        self.w3 = nn.Linear(config.hidden_size, 96, bias=False)
        self.w2 = nn.Linear(96, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.ffn_norm = nn.RMSNorm(config.hidden_size)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, output_attentions=False
    ):
        hidden_states = hidden_states + self.attention(
            self.attention_norm(hidden_states), attention_mask
        )
        outputs = (hidden_states + self.feed_forward(self.ffn_norm(hidden_states)),)
        return (*outputs, None) if output_attentions else outputs


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["InternLM2DecoderLayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.1)


class InternLM2Model(InternLM2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def forward(self, input_ids, attention_mask=None):
        hidden_states = self.tok_embeddings(input_ids)
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None] != 0)
            mask = mask | torch.eye(tokens, dtype=torch.bool, device=input_ids.device)
        positions = torch.arange(tokens, device=input_ids.device)[None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, positions, False)[0]
        return (self.norm(hidden_states),)


class InternLM2ForCausalLM(InternLM2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        logits = self.output(self.model(input_ids, attention_mask)[0])
        return CausalLMOutputWithPast(logits=logits)
