"""Put a loaded model on its devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError
from ..nn_modules.surgery import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def place(
    model: PreTrainedModel,
    device: str | int | torch.device | None,
    device_map: str | dict[str, Any] | None,
    max_memory: dict[Any, Any] | None,
) -> None:
    """Move a model as asked; to the first GPU, or the CPU without one, if nothing is asked.

    Its quantized layers are then laid out for the kernels of their devices.

    :raises ConfigError: (a ValueError) on an unknown automatic map
    """
    if isinstance(device_map, str) and device_map not in _AUTOMATIC:
        raise ConfigError(
            f"device_map is {device_map!r}; it must be a dict or one of {', '.join(_AUTOMATIC)}."
        )
    if device_map is None and max_memory is None:
        if device is None:
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        nn.Module.to(model, torch.device(device))
        model.__dict__["hf_device_map"] = {"": device}
        prepare(model)
        return
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole_blocks = list(getattr(model, "_no_split_modules", None) or [])
    if not isinstance(device_map, dict):
        kind = device_map or "auto"
        if kind != "sequential":
            max_memory = get_balanced_memory(
                model,
                max_memory,
                no_split_module_classes=whole_blocks,
                low_zero=kind == "balanced_low_0",
            )
        device_map = infer_auto_device_map(
            model, max_memory=max_memory, no_split_module_classes=whole_blocks
        )
    # The packed weights are buffers: without this they would stay on the device after each use.
    dispatch_model(model, device_map, offload_buffers=True)
    model.__dict__["hf_device_map"] = device_map
    prepare(model)
