"""Sizes of a model in the manner of ChatGLM."""

from transformers import PretrainedConfig


class GLMConfig(PretrainedConfig):
    model_type = "chatglm_of_2023"
    attribute_map = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}

    def __init__(self, padded_vocab_size=256, hidden_size=64, num_layers=2, **kwargs):
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.use_cache = True
        super().__init__(**kwargs)
