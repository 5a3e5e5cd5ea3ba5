"""The layouts of a packed linear on disk, and the way between each and a QuantLinear's buffers.

In memory there are always GPTQ's tensors.  Each tensor of a layout stands for one buffer and can
be converted alone, so a file is read tensor by tensor, whatever shard each lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import awq, marlin
from ..formats.gptq import convert_zeros, has_middle_zeros, trivial_g_idx
from ..nn_modules.qlinear.linear import QuantLinear
from .safetensors_file import Outgoing

Shape = Callable[[QuantLinear], tuple[int, ...]]
Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """How one buffer lies in a file."""

    name: str  # its name there
    shape: Shape
    decode: Convert
    encode: Convert


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _as_it_is(buffer: str) -> Stored:
    return Stored(buffer, lambda layer: tuple(getattr(layer, buffer).shape), _same, _same)


def _no_encoder(_tensor: Tensor) -> Tensor:
    raise AssertionError("this layout is only read")


_GPTQ = {name: _as_it_is(name) for name in ("qweight", "qzeros", "scales", "g_idx")}
# Per format: buffer -> how it is stored.  A buffer left out is not stored.
LAYOUTS: dict[str, dict[str, Stored]] = {
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "marlin": {
        "qweight": Stored(
            "B",
            lambda layer: (layer.in_features // 16, layer.out_features * 2),
            marlin.from_marlin_weight,
            marlin.to_marlin_weight,
        ),
        "scales": Stored("s", _GPTQ["scales"].shape, marlin.swap_scales, marlin.swap_scales),
    },
    "gemm": {
        "qweight": Stored(
            "qweight",
            lambda layer: (layer.in_features, layer.out_features // 8),
            awq.from_awq_weight,
            _no_encoder,
        ),
        "qzeros": Stored("qzeros", _GPTQ["qzeros"].shape, awq.from_awq_zeros, _no_encoder),
        "scales": _GPTQ["scales"],
    },
}
WRITABLE = ("gptq", "gptq_v2", "marlin")


def find_packed(names: Iterable[str], checkpoint_format: str) -> dict[str, str]:
    """Give the layout of every packed linear by its name, judging by the names of the tensors.

    Marlin's are recognised whatever the settings say, and settings that say Marlin are not
    believed where there is a ``qweight``: tools have written both.
    """
    present = set(names)
    other = "gptq" if checkpoint_format == "marlin" else checkpoint_format
    packed = {}
    for name in present:
        linear, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            packed[linear] = other
        elif leaf == "B" and f"{linear}.s" in present:
            packed[linear] = "marlin"
    return dict(sorted(packed.items()))


def encode(name: str, layer: QuantLinear, target: str) -> dict[str, Outgoing]:
    """Give the tensors to write for one layer, by their names inside it.

    All checks are made here; large tensors are converted only when they are written.

    :param name: what to call the layer in messages
    :raises CheckpointError: if the target cannot hold the layer
    """
    if target == "marlin":
        _check_marlin(name, layer)
    result = {}
    for buffer, stored in LAYOUTS[target].items():
        tensor = getattr(layer, buffer)
        if buffer == "qzeros":
            tensor = convert_zeros(
                tensor, layer.bits, source=layer.checkpoint_format, target=target, name=name
            )
        result[stored.name] = Outgoing(
            tensor.dtype, stored.shape(layer), partial(stored.encode, tensor)
        )
    if layer.bias is not None:
        result["bias"] = Outgoing.of(layer.bias)
    return result


def _check_marlin(name: str, layer: QuantLinear) -> None:
    trivial = trivial_g_idx(layer.in_features, layer.group_size, layer.g_idx.device)
    obstacle = marlin.find_obstacle(
        layer.bits,
        layer.in_features,
        layer.out_features,
        layer.group_size,
        has_middle_zeros(layer.qzeros, layer.bits, layer.checkpoint_format),
    )
    if obstacle is None and not torch.equal(layer.g_idx, trivial):
        obstacle = "its groups are scattered (act-order without static_groups)"
    if obstacle is None and layer.scales.dtype != torch.float16:
        obstacle = f"its scales are {layer.scales.dtype}; Marlin's are float16"
    if obstacle is not None:
        raise CheckpointError(
            f"{name} cannot be saved as 'marlin': {obstacle}. "
            "Save with checkpoint_format='gptq' instead."
        )
