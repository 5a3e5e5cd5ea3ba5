"""Sizes of a model in the manner of the first Qwen."""

from transformers import PretrainedConfig


class Qwen1Config(PretrainedConfig):
    model_type = "qwen_of_2023"
    attribute_map = {"num_hidden_layers": "n_layer"}

    def __init__(self, vocab_size=256, hidden_size=64, n_layer=2, heads=4, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.n_layer = n_layer
        self.heads = heads
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)
