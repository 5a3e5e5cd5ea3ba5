"""Put a loaded model on its devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError
from ..nn_modules.surgery import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Place:
    """Where a model shall lie: on one device, or spread by a map."""

    device: torch.device | None = None
    device_map: str | dict[str, Any] | None = None
    max_memory: dict[Any, Any] | None = None

    @classmethod
    def of(
        cls,
        device: str | int | torch.device | None,
        device_map: str | int | torch.device | dict[str, Any] | None,
        max_memory: dict[Any, Any] | None,
    ) -> Place:
        """Read what a caller asks for; a device instead of a map is one for all.

        :raises ConfigError: (a ValueError) if no device is called so, or this machine has none
        """
        for key in max_memory or ():
            if key not in ("cpu", "disk"):
                _device(key, "max_memory")
        if isinstance(device_map, dict):
            for value in device_map.values():
                if value not in ("cpu", "disk"):
                    _device(value, "device_map")
        elif device_map is not None and device_map not in _AUTOMATIC:
            return cls(_device(device_map, "device_map"))
        return cls(None if device is None else _device(device, "device"), device_map, max_memory)


def _device(given: Any, argument: str) -> torch.device:
    """Give a device that this machine has."""
    automatic = f", or one of {', '.join(_AUTOMATIC)}" if argument == "device_map" else ""
    try:
        # A number alone would be asked of whatever accelerator there is.
        device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f'{argument} is {given!r}; it must be a device like "cuda:0" or "cpu"{automatic}.'
        ) from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"{argument} names {given!r}, but torch {torch.__version__} sees {count} CUDA devices. "
            + ("Take one of these." if count else 'Take "cpu", or install a torch with CUDA.')
        )
    return device


def place(
    model: PreTrainedModel,
    device: str | int | torch.device | None,
    device_map: str | dict[str, Any] | None,
    max_memory: dict[Any, Any] | None,
) -> None:
    """Move a model as asked; to the first GPU, or the CPU without one, if nothing is asked.

    Its quantized layers are then laid out for the kernels of their devices.

    :raises ConfigError: (a ValueError) if no device is called so, or this machine has none
    """
    where = Place.of(device, device_map, max_memory)
    device, device_map, max_memory = where.device, where.device_map, where.max_memory
    if device_map is None and max_memory is None:
        if device is None:
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        nn.Module.to(model, torch.device(device))
        model.__dict__["hf_device_map"] = {"": str(device)}
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
