"""A tokenizer with one token per character, made on the spot."""

from __future__ import annotations

from typing import Any

from tests.tiny import VOCABULARY

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def tiny_tokenizer(with_bos: bool = True, with_pad: bool = True) -> Any:
    """Build a tokenizer that fits the tiny models.

    :param with_bos: have a BOS token and begin every text with it, as Llama's does
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(VOCABULARY) if chr(i).isprintable() or chr(i) == "\n"]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special: dict[str, Any] = {"eos_token": "</s>", "unk_token": "<unk>"}
    if with_bos:
        special["bos_token"] = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    if with_pad:
        special["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
