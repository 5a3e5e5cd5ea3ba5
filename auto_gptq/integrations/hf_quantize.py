"""Quantize a model that transformers has just loaded, as a ``GPTQConfig`` of transformers says."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..architectures import Architecture, find
from ..calibration.datasets import as_examples, columns, token_rows
from ..calibration.examples import make_batches
from ..errors import ConfigError
from ..modeling.limits import longest_sequence, padding_token
from ..modeling.save import saved_config
from ..pipeline.quantize import quantize_model
from ..quantization.config import BaseQuantizeConfig

# transformers' names of datasets → where they lie on the Hub, and how to take a part of them.
_DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"source": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {
        "source": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
    },
}
_DATASETS["c4-new"] = _DATASETS["c4"]
_ROWS, _LONGEST_ROW = 128, 2048


def quantize_loaded(model: Any, config: Any) -> dict[str, Any]:
    """Quantize a model in place, and give the settings as they have to be saved.

    :param config: a ``transformers.GPTQConfig``
    :raises ConfigError: (a ValueError) if it names nothing to calibrate with
    """
    settings = _settings(config)
    tokenizer = _tokenizer(model, config)
    batches = make_batches(
        _examples(model, config, tokenizer),
        config.batch_size,
        padding_token(model.config),
        getattr(model.config, "vocab_size", None),
        tokenizer=tokenizer,
        max_length=_longest(model, config),
    )
    quantize_model(model, _architecture(model, config), settings, batches)
    return saved_config(settings, model).to_dict()


def _settings(config: Any) -> BaseQuantizeConfig:
    """Read our settings out of transformers'.

    Its group-aware order keeps groups together and solves important columns first; here that is
    act-order with static groups.
    """
    given = dict(vars(config)) | dict(getattr(config, "given", {}))
    given.setdefault("checkpoint_format", given.get("format") or "gptq")
    known = {f.name for f in fields(BaseQuantizeConfig)} & given.keys() - {"quant_method"}
    settings = BaseQuantizeConfig(**{name: given[name] for name in known})
    if getattr(config, "act_group_aware", False) and not settings.desc_act:
        return replace(settings, desc_act=True, static_groups=True)
    return settings


def _architecture(model: Any, config: Any) -> Architecture:
    steps = config.modules_in_block_to_quantize
    blocks = config.block_name_to_quantize
    if not steps:
        row = find(model.config.model_type)
        return replace(row, blocks=blocks) if blocks else row
    own = tuple(step if isinstance(step, str) else " ".join(step) for step in steps)
    if blocks:
        return Architecture({model.config.model_type: None}, blocks, (), own)
    return replace(find(model.config.model_type), steps=own)


def _tokenizer(model: Any, config: Any) -> Any:
    given = config.tokenizer
    if given is not None and not isinstance(given, str):
        return given
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(given or model.name_or_path)


def _longest(model: Any, config: Any) -> int | None:
    return config.model_seqlen or longest_sequence(model.config)


def _examples(model: Any, config: Any, tokenizer: Any) -> Any:
    dataset = config.dataset
    if dataset is None:
        raise ConfigError(
            "To quantize while loading, GPTQConfig needs a dataset: a list of texts, or one of "
            f"{', '.join(_DATASETS)}. If the model is quantized already, its config.json lacks "
            "`quantization_config`; load it with AutoGPTQForCausalLM.from_quantized()."
        )
    if not isinstance(dataset, str):
        return list(dataset)
    options = dict(_DATASETS[dataset])
    texts = columns(options.pop("source"), ["text"], **options)["text"]
    length = min(_longest(model, config) or _LONGEST_ROW, _LONGEST_ROW)
    joined = "\n\n".join(texts[: 200 * _ROWS])
    return as_examples(token_rows(joined, tokenizer, length)[:_ROWS])
