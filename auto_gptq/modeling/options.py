"""Arguments that callers pass and that nothing here needs: said once, quietly, then dropped."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from ..errors import ConfigError
from ..hub import HUB_ARGUMENTS

logger = logging.getLogger(__name__)

# Flag → the value at which it asks for nothing.
MEANINGLESS = {
    "use_triton": False,
    "use_tritonv2": False,
    "use_qigen": False,
    "use_marlin": False,
    "use_cuda_fp16": True,
    "inject_fused_attention": False,
    "inject_fused_mlp": False,
    "warmup_triton": False,
    "autotune_warmup_after_quantized": False,
    "disable_exllama": None,
    "disable_exllamav2": False,
    "disable_marlin": None,
    "low_cpu_mem_usage": False,
}
# Hub arguments of former versions of transformers.
_OUTDATED = ("resume_download", "_commit_hash", "_raise_exceptions_for_missing_entries")


def note_meaningless(given: dict[str, Any]) -> None:
    """Say that flags which chose among AutoGPTQ's kernels choose nothing here."""
    for name, value in given.items():
        if name in MEANINGLESS and value != MEANINGLESS[name]:
            _say_once(f"{name}={value!r} has no effect: kernels are chosen when they run.")


def note_unknown(kwargs: dict[str, Any], *known: str) -> None:
    """Say which keyword arguments of ``from_quantized`` nobody knows."""
    understood = {*HUB_ARGUMENTS, *_OUTDATED, *known}
    unknown = sorted(set(kwargs) - understood - set(MEANINGLESS))
    if unknown:
        logger.info("Ignoring arguments that from_quantized does not know: %s", ", ".join(unknown))
    note_meaningless(kwargs)


def for_transformers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bring the keyword arguments of ``from_pretrained`` into the form of today's transformers."""
    note_meaningless(kwargs)
    dropped = {*_OUTDATED, *MEANINGLESS} - {"low_cpu_mem_usage"}
    kept = {name: value for name, value in kwargs.items() if name not in dropped}
    kept.pop("low_cpu_mem_usage", None)
    token = kept.pop("use_auth_token", None)
    if token is not None:
        kept.setdefault("token", token)
    return kept


def as_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """Give the dtype that is meant; None for "auto".

    :raises ConfigError: (a ValueError) for a name that is no dtype
    """
    if given is None or isinstance(given, torch.dtype):
        return given
    if given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"torch_dtype is {given!r}; give a torch.dtype, such as torch.float16.")
    return found


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
