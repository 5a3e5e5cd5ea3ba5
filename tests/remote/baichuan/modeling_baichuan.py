"""`W_pack`, biases of position instead of rotation, a head that is no linear but normalizes."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig

HEADS = 4


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class BaichuanAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None):
        _rows, _tokens, size = hidden_states.shape
        mixed = self.W_pack(hidden_states).unflatten(-1, (3, HEADS, size // HEADS))
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(2, 3) / (size // HEADS) ** 0.5 + attention_mask
        return self.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)), None, None


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, 96, bias=False)
        self.down_proj = nn.Linear(96, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, 96, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class BaichuanLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = BaichuanAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, use_cache=False):
        mixed, _, present = self.self_attn(self.input_layernorm(hidden_states), attention_mask)
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    _no_split_modules = ["BaichuanLayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.1)


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BaichuanLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.post_init()
        self.future_mask = None  # made when it is needed, and kept

    def get_input_embeddings(self):
        return self.embed_tokens

    def _positions(self, tokens, like):
        if self.future_mask is None or self.future_mask.shape[-1] < tokens:
            steps = torch.arange(tokens)
            slopes = 0.5 ** torch.arange(1, HEADS + 1)[:, None, None]
            late = steps[None, :] > steps[:, None]
            biases = slopes * (steps[None, :] - steps[:, None]).float()
            self.future_mask = biases.masked_fill(late, torch.finfo(torch.float16).min)
        return self.future_mask[None, :, :tokens, :tokens].to(like)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden_states = self.embed_tokens(input_ids)
        mask = self._positions(input_ids.shape[1], hidden_states)
        if attention_mask is not None:
            hidden = (attention_mask == 0)[:, None, None]
            mask = mask.masked_fill(hidden, torch.finfo(torch.float16).min)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, use_cache=use_cache)[0]
        return self.norm(hidden_states)


class NormHead(nn.Module):
    def __init__(self, size, vocab_size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, size))

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, nn.functional.normalize(self.weight))


class BaichuanForCausalLM(BaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, return_dict=None):
        hidden_states = self.model(input_ids, attention_mask, bool(use_cache))
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
