"""What callers pass, in all its spellings; what nothing here needs is said once, and dropped."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, QuantizedStateError
from ..hub import HUB_ARGUMENTS
from ..quantization.config import BaseQuantizeConfig

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that the kernels compute in
_CHOSEN = "kernels are chosen when they run"
_UNFUSED = "models run with their own attention and MLP"
# Flag → the value at which it asks for nothing, and why it has no effect at others.
MEANINGLESS = {
    "use_triton": (False, _CHOSEN),
    "use_tritonv2": (False, _CHOSEN),
    "use_qigen": (False, _CHOSEN),
    "use_marlin": (False, _CHOSEN),
    "use_cuda_fp16": (True, _CHOSEN),
    "disable_exllama": (None, _CHOSEN),
    "disable_exllamav2": (False, _CHOSEN),
    "disable_marlin": (None, _CHOSEN),
    "inject_fused_attention": (False, _UNFUSED),
    "inject_fused_mlp": (False, _UNFUSED),
    "warmup_triton": (False, "kernels need no warming up"),
    "autotune_warmup_after_quantized": (False, "kernels need no warming up"),
    "low_cpu_mem_usage": (False, "weights are never held twice"),
}
# Hub arguments of former versions of transformers.
_OUTDATED = ("resume_download", "_commit_hash", "_raise_exceptions_for_missing_entries")


def note_meaningless(given: dict[str, Any]) -> None:
    """Say, once each, which flags have no effect."""
    for name in MEANINGLESS.keys() & given.keys():
        nothing, reason = MEANINGLESS[name]
        if given[name] != nothing:
            _say_once(f"{name}={given[name]!r} has no effect: {reason}.")


def note_unknown(kwargs: dict[str, Any], *known: str) -> None:
    """Say which keyword arguments of ``from_quantized`` nobody knows."""
    unknown = kwargs.keys() - {*HUB_ARGUMENTS, *_OUTDATED, *MEANINGLESS, *known}
    if unknown:
        names = ", ".join(sorted(unknown))
        logger.info("Ignoring arguments that from_quantized does not know: %s", names)
    note_meaningless(kwargs)


def for_transformers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bring the keyword arguments of ``from_pretrained`` into the form of today's transformers."""
    note_meaningless(kwargs)
    dropped = {*_OUTDATED, *MEANINGLESS, "use_auth_token"}
    kept = {name: value for name, value in kwargs.items() if name not in dropped}
    if kwargs.get("use_auth_token") is not None:
        kept.setdefault("token", kwargs["use_auth_token"])
    return kept


def as_quantize_config(given: Any) -> BaseQuantizeConfig:
    """Give the settings that are meant by ours, a dict or a ``transformers.GPTQConfig``.

    :raises ConfigError: (a ValueError) for anything else
    """
    if isinstance(given, BaseQuantizeConfig):
        return given
    if hasattr(given, "to_dict") and not isinstance(given, type):
        # What says "auto" or None there is left to our defaults; enumerations become strings.
        found = {name: getattr(value, "value", value) for name, value in given.to_dict().items()}
        given = {name: value for name, value in found.items() if value not in (None, "auto")}
    if isinstance(given, dict):
        return BaseQuantizeConfig.from_quant_config(given)
    raise ConfigError(
        f"quantize_config is {given!r}; give BaseQuantizeConfig(bits=4, group_size=128), say."
    )


def check_dense(source: str | Path, config: Any) -> None:
    """Refuse a checkpoint that is quantized already.

    :raises QuantizedStateError: (an EnvironmentError)
    """
    there = getattr(config, "quantization_config", None)
    if not isinstance(there, dict):
        return
    method = there.get("quant_method")
    if method in ("gptq", "awq"):
        raise QuantizedStateError(
            f"{source} is quantized already (quant_method {method!r}, {there.get('bits')} bits). "
            "Load it with from_quantized(), or give from_pretrained() the full-precision model."
        )


def as_settings(
    given: BaseQuantizeConfig | dict[str, Any] | None,
    source: str | Path,
    checkpoint_format: str | None,
    kwargs: dict[str, Any],
) -> BaseQuantizeConfig:
    """Give the settings of a checkpoint: what the caller says, else what its files say."""
    if given is None:
        return BaseQuantizeConfig.from_pretrained(
            source, checkpoint_format=checkpoint_format, **kwargs
        )
    if isinstance(given, dict):
        return BaseQuantizeConfig.from_quant_config(given, checkpoint_format)
    return as_quantize_config(given)


def as_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """Give the dtype that is meant; None for "auto".

    :raises ConfigError: (a ValueError) for what is no dtype to compute in
    """
    if given is None or given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found not in _DTYPES:
        raise ConfigError(
            f"torch_dtype is {given!r}; give torch.float16, torch.bfloat16 or torch.float32."
        )
    return found


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
