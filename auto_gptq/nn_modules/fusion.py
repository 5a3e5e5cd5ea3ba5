"""Linears that read the same input, computed as one matrix.

The modules stay: saving, adapters and transformers' own attention see every projection by itself.
Only the memory is shared. Tiles lie output by output, so the tiles of q, k and v one after another
*are* the tiles of q|k|v, and each module keeps a view of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats.tiles import SIDE
from .qlinear.linear import QuantLinear

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Tiled:
    """The operator over tiles and its arguments after the input."""

    operator: Callable[..., Tensor]
    tiles: Tensor  # [N' / 64, K' / 64, 128 * bits] int32
    scales: Tensor  # [G, N']
    zeros: Tensor | None  # [G, N'] uint8
    perm: Tensor | None  # [K] int32
    bias: Tensor | None  # [N]
    settings: tuple[int, int, int, int]  # bits, group_size, K, N

    def __call__(self, x: Tensor) -> Tensor:  # [..., K] → [..., N]
        return self.operator(
            x, self.tiles, self.scales, self.zeros, self.perm, self.bias, *self.settings
        )

    @staticmethod
    def of(layer: QuantLinear) -> _Tiled:
        named = layer._buffers
        tiles, scales = named["tiles"], named["tile_scales"]
        assert tiles is not None and scales is not None
        settings = layer.bits, layer.group_size, layer.in_features, layer.out_features
        ops = torch.ops.auto_gptq
        operator = ops.q_matmul_int8 if layer.int8_activations else ops.q_matmul
        return _Tiled(
            operator.default,
            tiles,
            scales,
            named["tile_zeros"],
            named["perm"],
            layer.bias,
            settings,
        )


def product(linears: Sequence[nn.Module]) -> Product:
    """Give the function that multiplies an input by all these weights, results side by side.

    Weights in tiles are laid side by side in memory, if they fit together. The function computes
    with the tensors as they are now; it takes no part in gradients.
    """
    layers = [each for each in linears if isinstance(each, QuantLinear) and each.is_prepared]
    if len(layers) == len(linears) and find_obstacle(layers) is None:
        # Outside of inference mode, so that the modules can still be trained with.
        with torch.inference_mode(False), torch.no_grad():
            return _side_by_side(layers)
    if len(linears) == 1:
        return linears[0]

    def apart(x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in linears], -1)

    return apart


def find_obstacle(layers: Sequence[QuantLinear]) -> str | None:
    """Say why prepared layers cannot be one matrix, or None if they can."""
    first = layers[0]
    for layer in layers[1:]:
        for name in ("bits", "group_size", "in_features", "int8_activations"):
            if getattr(layer, name) != getattr(first, name):
                return f"{name} is {getattr(layer, name)} beside {getattr(first, name)}"
        own, other = layer._buffers["perm"], first._buffers["perm"]
        if (own is None) != (other is None) or (
            own is not None and other is not None and not torch.equal(own, other)
        ):
            return "their inputs are in different orders"
        if layer.tile_scales.dtype != first.tile_scales.dtype:
            return f"scales are {layer.tile_scales.dtype} beside {first.tile_scales.dtype}"
    widths = [layer.out_features for layer in layers[:-1]]
    if any(width % SIDE for width in widths):
        return f"out_features {widths} do not fill whole tiles of {SIDE}"
    return None


def _side_by_side(layers: Sequence[QuantLinear]) -> Product:
    parts = [_Tiled.of(layer) for layer in layers]
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    tiles = torch.cat([part.tiles for part in parts])
    views = tiles.split([len(part.tiles) for part in parts])
    for layer, view in zip(layers, views, strict=True):
        layer._buffers["tiles"] = view
    bits, group_size, in_features, _ = first.settings
    return _Tiled(
        first.operator,
        tiles,
        torch.cat([part.scales for part in parts], 1),
        _zeros(parts, bits),
        first.perm,
        _bias(layers),
        (bits, group_size, in_features, sum(part.settings[-1] for part in parts)),
    )


def _zeros(parts: Sequence[_Tiled], bits: int) -> Tensor | None:
    if all(part.zeros is None for part in parts):
        return None
    middle = 1 << (bits - 1)
    like = next(part.zeros for part in parts if part.zeros is not None)
    return torch.cat(
        [
            like.new_full(part.scales.shape, middle) if part.zeros is None else part.zeros
            for part in parts
        ],
        1,
    )


def _bias(layers: Sequence[QuantLinear]) -> Tensor | None:
    given = [layer.bias for layer in layers if layer.bias is not None]
    if not given:
        return None
    return torch.cat(
        [
            given[0].new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
    )
