"""Train adapters on a quantized model with PEFT, under AutoGPTQ's names.

PEFT takes a :class:`QuantLinear` for what it is, an ``nn.Linear``, so nothing in it is replaced:
``peft.get_peft_model`` works as well, with LoRA, DoRA, AdaLoRA, IA3 and others. What would write
into the quantized weights (merging, PiSSA) raises DerivedWeightError.

Mixtures of experts are the exception. PEFT rewrites adapters of their linears for the fused tensors
of transformers 5, which a quantized model does not have, and then skips the experts without a word.
:func:`adapting_experts` keeps it from that; :func:`get_gptq_peft_model` uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigError
from ..modeling import BaseGPTQForCausalLM
from ..nn_modules.unfused import find_unfused
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
# Where PEFT rewrites adapters, and what each function does its work on and would have to return.
_CONVERSIONS = "peft.utils.transformers_weight_conversion"
_CONVERT_CONFIG = "convert_peft_config_for_transformers"
_CONVERT_WEIGHTS = "convert_peft_adapter_state_dict_for_transformers"


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
        with adapting_experts():
            loaded: PeftModel = peft.PeftModel.from_pretrained(inner, model_id, adapter_name)
        return loaded
    config = _fitted(peft_config, inner, auto_find_all_linears)
    try:
        with adapting_experts():
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


@contextmanager
def adapting_experts() -> Iterator[None]:
    """Let PEFT adapt the experts of quantized models one by one, inside a ``with``.

    Wrap the making and the loading of an adapter in it. Other models are treated as ever.
    """
    _peft()
    try:
        module: Any = importlib.import_module(_CONVERSIONS)
    except ModuleNotFoundError:  # PEFT before 0.19 rewrites nothing
        yield
        return
    former = {name: getattr(module, name) for name in (_CONVERT_CONFIG, _CONVERT_WEIGHTS)}
    setattr(module, _CONVERT_CONFIG, _unless_parted(former[_CONVERT_CONFIG], model_at=1))
    setattr(
        module, _CONVERT_WEIGHTS, _unless_parted(former[_CONVERT_WEIGHTS], model_at=0, result_at=2)
    )
    try:
        yield
    finally:
        vars(module).update(former)


def _unless_parted(
    convert: Callable[..., Any], *, model_at: int, result_at: int | None = None
) -> Callable[..., Any]:
    """Make a conversion do nothing to a model whose experts are modules of their own.

    :param model_at: position of the model among the arguments
    :param result_at: position of what is converted, if it is returned and not changed in place
    """
    names = list(inspect.signature(convert).parameters)

    @functools.wraps(convert)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not find_unfused(given[names[model_at]]):
            return convert(*args, **kwargs)
        return None if result_at is None else given[names[result_at]]

    return wrapped


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
