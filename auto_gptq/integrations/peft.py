"""Train adapters on a quantized model with PEFT, under AutoGPTQ's names.

PEFT takes a :class:`QuantLinear` for what it is, an ``nn.Linear``, so nothing in it is replaced:
``peft.get_peft_model`` works as well, with LoRA, DoRA, AdaLoRA, IA3 and others. What would write
into the quantized weights (merging, PiSSA) raises DerivedWeightError.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigError
from ..modeling import BaseGPTQForCausalLM
from ..optional import require

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# AutoGPTQ's name -> the class of PEFT that it extends, made when first asked for.
_BASES = {
    "GPTQLoraConfig": "LoraConfig",
    "GPTQLoraModel": "LoraModel",
    "GPTQAdaLoraConfig": "AdaLoraConfig",
    "GPTQAdaLoraModel": "AdaLoraModel",
}
# What a config of PEFT's type is turned into.
_CONFIGS = {"LORA": "GPTQLoraConfig", "ADALORA": "GPTQAdaLoraConfig"}
# Settings that AutoGPTQ's configs carry and that mean nothing here.
_FUSED = ("injected_fused_attention", "injected_fused_mlp")


def __getattr__(name: str) -> Any:
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _make(name)


@functools.cache
def _make(name: str) -> type:
    base = getattr(_peft(), _BASES[name])
    body: dict[str, Any] = {
        "__module__": __name__,  # where pickle finds it, through __getattr__
        "__doc__": f"PEFT's {base.__name__}, under AutoGPTQ's name.",
    }
    if not name.endswith("Config"):
        return type(name, (base,), body)

    def to_dict(self: Any) -> dict[str, Any]:
        """Give the settings as PEFT knows them, so that it can read what is saved."""
        return {key: value for key, value in base.to_dict(self).items() if key not in _FUSED}

    fields = [(key, bool, dataclasses.field(default=False)) for key in _FUSED]
    return dataclasses.make_dataclass(
        name, fields, bases=(base,), namespace=body | {"to_dict": to_dict}
    )


def _peft() -> Any:
    return require("peft", "Training or loading an adapter")


def find_all_linear_names(
    model: nn.Module, ignore: Iterable[str] | None = None, ignore_lm_head: bool = True
) -> list[str]:
    """Give the last part of the name of every linear layer, packed or not, each once.

    :param ignore: names, whole or last parts, to leave out
    """
    inner = _inner(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)() if ignore_lm_head else None
    left_out = set(ignore or ())
    names = []
    for name, module in inner.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and module is not head and not {name, last} & left_out:
            names.append(last)
    return list(dict.fromkeys(names))


def get_gptq_peft_model(
    model: BaseGPTQForCausalLM,
    peft_config: PeftConfig | None = None,
    model_id: str | None = None,
    adapter_name: str = "default",
    auto_find_all_linears: bool = True,
    train_mode: bool = False,
) -> PeftModel:
    """Put a new adapter on a quantized model (``train_mode=True``) or load a trained one.

    :param peft_config: settings of the new adapter; the object itself is left as it is
    :param model_id: folder or Hub id of the trained adapter
    :param auto_find_all_linears: let LoRA and AdaLoRA adapt every linear layer but the head,
        whatever ``peft_config.target_modules`` says
    :raises ConfigError: (a ValueError) if the settings, or the trained adapter, are not given
    :raises MissingLibraryError: (an ImportError) if PEFT is not installed
    """
    if train_mode and not peft_config:
        raise ConfigError("train_mode=True makes a new adapter and needs its peft_config.")
    if not train_mode and not model_id:
        raise ConfigError(
            "Without train_mode=True a trained adapter is loaded: give its folder or Hub id as "
            "model_id, or set train_mode=True for a new one."
        )
    peft, inner = _peft(), _inner(model)
    if not train_mode:
        loaded: PeftModel = peft.PeftModel.from_pretrained(inner, model_id, adapter_name)
        return loaded
    config = _fitted(peft_config, inner, auto_find_all_linears)
    try:
        adapted: PeftModel = peft.get_peft_model(inner, config, adapter_name=adapter_name)
    except StopIteration as error:  # adaption prompts: next(attention.parameters())
        raise ConfigError(
            f"PEFT's {type(config).__name__} looks for a parameter in modules that hold only "
            "packed tensors once quantized. LoRA and prefix tuning work."
        ) from error
    for name, parameter in adapted.named_parameters():
        # On a half-precision base PEFT 0.21 leaves AdaLoRA's ranks trainable, but does not save
        # them: a loaded adapter would differ from the trained one.
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return adapted


def _inner(model: nn.Module) -> Any:
    return model.model if isinstance(model, BaseGPTQForCausalLM) else model


def _fitted(config: Any, model: Any, auto_find_all_linears: bool) -> Any:
    """Give a copy of the settings, of AutoGPTQ's class and fitted to the model."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    wanted = _make(_CONFIGS[kind]) if kind in _CONFIGS else type(config)
    made: Any = object.__new__(type(config) if isinstance(config, wanted) else wanted)
    made.__dict__.update(vars(config))
    if kind in _CONFIGS and auto_find_all_linears:
        made.target_modules = set(find_all_linear_names(model))
    if kind == "ADAPTION_PROMPT":
        blocks = model.config.num_hidden_layers
        made.adapter_layers = min(made.adapter_layers, blocks)
    return made
