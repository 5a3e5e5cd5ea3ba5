"""One weight per projection out of all experts' tiles, for one product of all experts' rows.

As in :mod:`.fusion` the modules stay and keep views, so that saving, adapters and hooks see every
linear by itself.  What was laid together serves only as long as nobody changes a linear; every call
looks at that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import expert_ops, native, self_test
from .fusion import find_obstacle
from .qlinear.linear import QuantLinear

LEAST_CAPABILITY = (8, 0)  # of a GPU, for csrc/cuda/q_experts.cu

_SAME = ("bits", "group_size", "in_features", "out_features", "int8_activations")


@dataclass(frozen=True)
class Place:
    """Where a linear of an expert stands."""

    expert: int
    parent: nn.Module
    name: str  # in the parent

    @property
    def module(self) -> nn.Module | None:
        """The linear."""
        return self.parent._modules[self.name]


@dataclass(frozen=True)
class GroupedProduct:
    """A weight per expert: of one projection, or of those that read the same input."""

    tiles: Tensor  # [E, N' / 64, K' / 64, 128 * bits] int32
    scales: Tensor  # [E, G, N']
    zeros: Tensor | None  # [E, G, N'] uint8
    perm: Tensor | None  # [E, K] int32
    bias: Tensor | None  # [E, N]
    settings: tuple[int, int, int, int]  # bits, group_size, K, N
    int8_activations: bool

    def __call__(self, x: Tensor, rows: Tensor | None, offsets: Tensor) -> Tensor:  # [S, N]
        """Multiply each expert's rows by its own weight."""
        weight = self.tiles, self.scales, self.zeros, self.perm, self.bias
        y: Tensor = torch.ops.auto_gptq.q_experts(
            x, rows, offsets, *weight, *self.settings, self.int8_activations
        )
        return y


class GroupedExperts:
    """The products of all experts of a module, and the linears whose memory they share."""

    def __init__(
        self, products: Mapping[tuple[str, ...], list[GroupedProduct]], places: Sequence[Place]
    ) -> None:
        self.products = products
        layers = [place.module for place in places]
        self._layers = layers
        self._parents = [place.parent._modules for place in places]
        self._names = [place.name for place in places]
        self._buffers = [layer._buffers for layer in layers if layer is not None]
        self._tiles = [buffers["tiles"] for buffers in self._buffers]
        self._attributes = [vars(layer) for layer in layers]
        self._hooks = [
            hooks
            for layer in layers
            if layer is not None
            for hooks in (layer._forward_hooks, layer._forward_pre_hooks)
        ]

    def is_current(self) -> bool:
        """Tell whether every linear is the one it was, in the same memory, and nobody watches it.

        No loops in Python: 128 experts have 384 linears, and a decoding step little time.
        """
        return (
            all(map(is_, map(dict.get, self._parents, self._names), self._layers))
            and all(map(is_, map(dict.get, self._buffers, repeat("tiles")), self._tiles))
            and not any(self._hooks)
            and not any(map(dict.__contains__, self._attributes, repeat("_hf_hook")))
        )

    def project(
        self, parts: tuple[str, ...], x: Tensor, rows: Tensor | None, offsets: Tensor
    ) -> Tensor:
        """Give the outputs of projections side by side."""
        outputs = [product(x, rows, offsets) for product in self.products[parts]]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def group(projections: Mapping[tuple[str, ...], list[list[Place]]]) -> GroupedExperts | str:
    """Lay experts' linears together in memory, or say why they stay apart.

    :param projections: names of parts that read the same input → for each, all experts' linears
    """
    columns = [column for parts in projections.values() for column in parts]
    obstacle = next(filter(None, (_find_stranger(column) for column in columns)), None)
    if obstacle is not None:
        return obstacle
    layers = [[place.module for place in column] for column in columns]
    obstacle = _find_device(layers) or next(filter(None, map(_find_difference, columns)), None)
    if obstacle is not None:
        return obstacle
    # Outside of inference mode, so that the modules can still be trained with.
    with torch.inference_mode(False), torch.no_grad():
        products = {names: _lay_parts(parts) for names, parts in projections.items()}
    return GroupedExperts(products, [place for column in columns for place in column])


def _find_stranger(column: Sequence[Place]) -> str | None:
    """Say which linear must be called by itself, and why."""
    for place in column:
        layer, name = place.module, f"{place.name} of expert {place.expert}"
        if type(layer) is not QuantLinear:
            return f"{name} is a {type(layer).__name__}, not a QuantLinear"
        if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
            return f"{name} has hooks, which only a call of its own runs"
        if not layer.is_prepared:
            return f"{name} is not laid out in tiles"
    return None


def _find_device(columns: Sequence[Sequence[Any]]) -> str | None:
    devices = {layer.tiles.device for column in columns for layer in column}
    if len(devices) > 1:
        return f"the experts are on {', '.join(sorted(map(str, devices)))}"
    device = devices.pop()
    if device.type == "cuda":
        if not native.has_cuda():
            return "auto_gptq/_native.so has no CUDA kernels"
        found = torch.cuda.get_device_capability(device)
        if found < LEAST_CAPABILITY:
            return "{} is sm_{}{}, older than sm_{}{}".format(device, *found, *LEAST_CAPABILITY)
    wrong = self_test.failure_of_experts(device, columns[0][0].bits)
    return None if wrong is None else f"the self-test fails: {wrong}"


def _find_difference(column: Sequence[Place]) -> str | None:
    """Say what keeps one projection's weights from being one tensor."""
    first = _described(column[0])
    for place in column[1:]:
        for name, value in _described(place).items():
            if value != first[name]:
                return (
                    f"{name} is {value} in {place.name} of expert {place.expert}, "
                    f"but {first[name]} in expert {column[0].expert}"
                )
    return None


def _described(place: Place) -> dict[str, Any]:
    layer: Any = place.module
    return {name: getattr(layer, name) for name in _SAME} | {
        "the dtype of the scales": layer.tile_scales.dtype,
        "a bias": layer.bias is not None,
    }


def _lay_parts(parts: list[list[Place]]) -> list[GroupedProduct]:
    """Lay all parts side by side, or each by itself where they do not fit together."""
    columns: list[list[Any]] = [[place.module for place in column] for column in parts]
    experts = list(zip(*columns, strict=True))
    if len({layer.bias is None for layer in experts[0]}) == 1 and not any(
        map(find_obstacle, experts)
    ):
        return [_lay_together(experts)]
    return [_lay_together([(layer,) for layer in column]) for column in columns]


def _lay_together(experts: Sequence[Sequence[Any]]) -> GroupedProduct:
    """Copy the experts' tensors into one, expert by expert, and give the layers views of it."""
    first = experts[0]
    tiles = _stack(experts, "tiles", 0)
    scales = _stack(experts, "tile_scales", 1)
    assert tiles is not None and scales is not None
    _fill_up(experts)
    zeros = _stack(experts, "tile_zeros", 1)
    perm = None
    if any(layers[0].perm is not None for layers in experts):
        own = torch.arange(first[0].in_features, dtype=torch.int32, device=tiles.device)
        perm = torch.stack([own if each[0].perm is None else each[0].perm for each in experts])
    bias = None
    if first[0].bias is not None:
        bias = torch.stack([torch.cat([layer.bias for layer in layers]) for layers in experts])
    outputs = sum(layer.out_features for layer in first)
    settings = first[0].bits, first[0].group_size, first[0].in_features, outputs
    return GroupedProduct(tiles, scales, zeros, perm, bias, settings, first[0].int8_activations)


def _stack(experts: Sequence[Sequence[Any]], name: str, dim: int) -> Tensor | None:
    """Stack what layers call ``name``, an expert's side by side in dimension ``dim``."""
    first = [layer._buffers[name] for layer in experts[0]]
    if first[0] is None:
        return None
    widths = [tensor.shape[dim] for tensor in first]
    shape = list(first[0].shape)
    shape[dim] = sum(widths)
    together: Tensor = first[0].new_empty((len(experts), *shape))
    for whole, layers in zip(together, experts, strict=True):
        for view, layer in zip(whole.split(widths, dim), layers, strict=True):
            view.copy_(layer._buffers[name])
            layer._buffers[name] = view  # frees the layer's own memory before the next is copied
    return together


def _fill_up(experts: Sequence[Sequence[Any]]) -> None:
    """Write out zero points where only some layers have them."""
    layers = [layer for each in experts for layer in each]
    if any(layer.tile_zeros is not None for layer in layers):
        for layer in layers:
            if layer.tile_zeros is None:
                middle = 1 << (layer.bits - 1)
                layer._buffers["tile_zeros"] = torch.full_like(
                    layer.tile_scales, middle, dtype=torch.uint8
                )


_ = expert_ops  # importing it defines the operators
