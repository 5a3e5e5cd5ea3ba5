"""Carry along what a model came with: its tokenizer and its settings for generation.

The tokenizer's files are copied as they are.  Loading and saving a tokenizer would need its code,
and rewrites the files in the form of the transformers that runs, which an older one may not read.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The names under which transformers, sentencepiece and tiktoken keep their vocabularies, and what
# belongs to the processors of models that read images or sound.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "qwen.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
)
_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Source:
    """The folder or Hub repository that a model was loaded from."""

    name: str | Path
    hub_arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str | Path, arguments: dict[str, Any]) -> Source:
        """Remember the place, and those of a call's arguments that say how to reach it."""
        return cls(name, hub.hub_arguments(arguments))

    def find(self, name: str) -> Path | None:
        """Give the local path of one of its files, or None."""
        return hub.find_file(self.name, name, **self.hub_arguments)


def carry_files(source: Source, folder: Path) -> None:
    """Copy the tokenizer's files into a folder.

    A failure is only logged: it must not cost the user a model that took hours to quantize.
    """
    try:
        for name in TOKENIZER_FILES:
            path = source.find(name)
            if path is not None:
                shutil.copyfile(path, folder / name)
    except OSError as error:
        logger.warning("The tokenizer of %s was not copied: %s", source.name, error)


def load_generation_config(model: PreTrainedModel, source: Source) -> None:
    """Give a model the settings for generation that lie beside its weights, if there are any."""
    from transformers import GenerationConfig

    path = source.find(_GENERATION_CONFIG)
    if path is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path.parent, path.name)
