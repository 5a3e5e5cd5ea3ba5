"""Sizes of a model in the manner of InternLM2."""

from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2_of_2024"

    def __init__(self, vocab_size=256, hidden_size=64, num_hidden_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)
