"""What a mixture of experts runs on: schema, fake and plain version of each operator.

Letters: E experts, T tokens, each to ``top_k`` of them, S = T * top_k rows, sorted by expert; K
inputs and N outputs of a projection. ``csrc/experts.h`` has the same for NVIDIA GPUs, where no
operator waits for the numbers of rows: not the host either.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

_library = torch.library.Library("auto_gptq", "FRAGMENT")


def _define(name: str, arguments: str, implementation: Any, result: str = "Tensor") -> None:
    _library.define(f"{name}({arguments}) -> {result}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")


def sort_by_expert(
    index: Tensor,  # [T, top_k] int, the experts of each token; what is not below E is nobody's
    experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the token of each row, the row of each entry, and where experts' rows begin and end.

    All int32: ``rows [S]``, sorted by expert and then by entry; ``places [S]``, the other way;
    ``offsets [E + 1]``, from 0 on.
    """
    chosen = index.reshape(-1).to(torch.long)
    chosen = torch.where((chosen < 0) | (chosen >= experts), experts, chosen)
    ordered, order = torch.sort(chosen, stable=True)
    numbers = torch.arange(experts + 1, device=index.device)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=index.device)
    offsets = torch.searchsorted(ordered, numbers)
    rows = order // index.shape[1]
    return rows.to(torch.int32), places.to(torch.int32), offsets.to(torch.int32)


def q_experts(
    x: Tensor,  # [T, K]
    rows: Tensor | None,  # [S] int32: the row of x that each row of y is made of; None: its own
    offsets: Tensor,  # [E + 1] int32
    tiles: Tensor,  # [E, N' / 64, K' / 64, 128 * bits] int32
    scales: Tensor,  # [E, G, N']
    zeros: Tensor | None,  # [E, G, N'] uint8
    perm: Tensor | None,  # [E, K] int32
    bias: Tensor | None,  # [E, N]
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    int8_activations: bool,
) -> Tensor:  # [S, N] in the dtype of x
    """Multiply each expert's rows by its own weight; rows behind the last expert's give 0."""
    sorted_rows = x if rows is None else x[rows.long()]
    y = x.new_zeros(sorted_rows.shape[0], out_features)
    stops = offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(stops)):
        if start < stop:
            weight = reference.dequantize_tiles(
                tiles[e],
                scales[e],
                None if zeros is None else zeros[e],
                None if perm is None else perm[e],
                bits,
                group_size,
                in_features,
                out_features,
                x.dtype,
            )
            added = None if bias is None else bias[e].to(x.dtype)
            y[start:stop] = F.linear(sorted_rows[start:stop], weight, added)
    return y


def combine_experts(
    y: Tensor,  # [S, N]
    places: Tensor,  # [S] int32
    weights: Tensor,  # [T, top_k]
) -> Tensor:  # [T, N] in the dtype of y
    """Add up each token's rows times their weights, in fp32."""
    rows = y[places.long()].view(*weights.shape, y.shape[1]).to(torch.float32)
    return (rows * weights.to(torch.float32)[..., None]).sum(1).to(y.dtype)


_define(
    "sort_by_expert",
    "Tensor index, int experts",
    sort_by_expert,
    "(Tensor rows, Tensor places, Tensor offsets)",
)


@torch.library.register_fake("auto_gptq::sort_by_expert", lib=_library)
def _(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    def made(size: int) -> Tensor:
        return index.new_empty(size, dtype=torch.int32)

    return made(index.numel()), made(index.numel()), made(experts + 1)


_define(
    "q_experts",
    "Tensor x, Tensor? rows, Tensor offsets, Tensor tiles, Tensor scales, Tensor? zeros, "
    "Tensor? perm, Tensor? bias, int bits, int group_size, int in_features, int out_features, "
    "bool int8_activations",
    q_experts,
)


@torch.library.register_fake("auto_gptq::q_experts", lib=_library)
def _(x: Tensor, rows: Tensor | None, *others: Any) -> Tensor:
    return x.new_empty((x if rows is None else rows).shape[0], others[-2])


_define("combine_experts", "Tensor y, Tensor places, Tensor weights", combine_experts)


@torch.library.register_fake("auto_gptq::combine_experts", lib=_library)
def _(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, places, weights = ctx.saved_tensors
    index, wide = places.long(), grad.to(torch.float32)[:, None]
    per_row = (weights.to(torch.float32)[..., None] * wide).flatten(0, 1).to(y.dtype)
    grad_y = torch.empty_like(y).index_copy_(0, index, per_row)
    rows = y[index].view(*weights.shape, y.shape[1]).to(torch.float32)
    return grad_y, None, (rows * wide).sum(-1).to(weights.dtype)


torch.library.register_autograd(
    "auto_gptq::combine_experts", _backward, setup_context=_keep_for_backward, lib=_library
)
