"""Sizes of a model in the manner of Baichuan, whose model type has a row of the table."""

from transformers import PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    model_type = "baichuan"

    def __init__(self, vocab_size=256, hidden_size=64, num_hidden_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)
