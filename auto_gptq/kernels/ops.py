"""Every operator's schema with its fake and plain implementation, one under the other.

Callers say ``torch.ops.auto_gptq.<name>`` and never ask for a device: the dispatcher takes the
compiled kernel where :mod:`.native` has registered one, and plain torch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference

_PACKED = "Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx"

_library = torch.library.Library("auto_gptq", "DEF")


def _define(name: str, arguments: str, implementation: Any, result: str = "Tensor") -> None:
    _library.define(f"{name}({arguments}) -> {result}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")


_define(
    "dequantize",
    f"{_PACKED}, int bits, int zero_offset, ScalarType dtype",
    reference.dequantize,
)


@torch.library.register_fake("auto_gptq::dequantize", lib=_library)
def _(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return qweight.new_empty((qweight.shape[1], g_idx.shape[0]), dtype=dtype)


_define(
    "q_linear",
    f"Tensor x, {_PACKED}, Tensor? bias, int bits, int zero_offset",
    reference.q_linear,
)


@torch.library.register_fake("auto_gptq::q_linear", lib=_library)
def _(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    bits: int,
    zero_offset: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[1]))


# The weight is constant, so the only gradient is the one towards x: grad @ weight.
def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, qweight, qzeros, scales, g_idx, _bias, ctx.bits, ctx.zero_offset = inputs
    ctx.save_for_backward(qweight, qzeros, scales, g_idx)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed = ctx.saved_tensors
    weight = torch.ops.auto_gptq.dequantize(*packed, ctx.bits, ctx.zero_offset, grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
    return grad @ weight, None, None, None, None, grad_bias, None, None


torch.library.register_autograd(
    "auto_gptq::q_linear", _backward, setup_context=_keep_for_backward, lib=_library
)


_define(
    "q_linear_experts",
    "Tensor x, Tensor offsets, Tensor[] qweight, Tensor[] qzeros, Tensor[] scales, "
    "Tensor[] g_idx, int bits, int zero_offset",
    reference.q_linear_experts,
)


@torch.library.register_fake("auto_gptq::q_linear_experts", lib=_library)
def _(x: Tensor, offsets: Tensor, qweight: list[Tensor], *_others: Any) -> Tensor:
    return x.new_empty(x.shape[0], qweight[0].shape[1])


_define(
    "solve_columns",
    "Tensor(a!) weight, Tensor(b!) codes, Tensor(c!) errors, "
    "Tensor inverse, Tensor scales, Tensor zeros, Tensor group, int maxq",
    reference.solve_columns,
    "()",
)


@torch.library.register_fake("auto_gptq::solve_columns", lib=_library)
def _(*_tensors: Tensor | int) -> None:
    return None


_define(
    "fit_grids",
    "Tensor weight, Tensor importance, Tensor factors, int group_size, int bits, bool symmetric, "
    "int lowest_zero, ScalarType scale_dtype",
    reference.fit_grids,
    "(Tensor scales, Tensor zeros)",
)


@torch.library.register_fake("auto_gptq::fit_grids", lib=_library)
def _(
    weight: Tensor,
    importance: Tensor,
    factors: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    lowest_zero: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape = (-(-weight.shape[0] // group_size), weight.shape[1])
    return weight.new_empty(shape), weight.new_empty(shape)


_define(
    "solve_matrix",
    "Tensor(a!) weight, Tensor(b!) codes, Tensor(c!) errors, Tensor inverse, Tensor(d!) scales, "
    "Tensor(e!) zeros, Tensor group, Tensor importance, Tensor factors, int group_size, int bits, "
    "bool symmetric, int lowest_zero, ScalarType scale_dtype",
    reference.solve_matrix,
)


@torch.library.register_fake("auto_gptq::solve_matrix", lib=_library)
def _(weight: Tensor, *_others: Any) -> Tensor:
    return weight.new_empty(weight.shape[1])


_define("pack_codes", "Tensor codes, int bits", reference.pack_codes)


@torch.library.register_fake("auto_gptq::pack_codes", lib=_library)
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.shape[1] // 32 * bits, codes.shape[0]), dtype=torch.int32)


_define(
    "dequantize_codes",
    "Tensor codes, Tensor scales, Tensor zeros, Tensor g_idx, ScalarType dtype",
    reference.dequantize_codes,
)


@torch.library.register_fake("auto_gptq::dequantize_codes", lib=_library)
def _(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


# Weights in tiles (formats/tiles.py).  in_features and out_features are K and N before padding.
_TILES = "Tensor tiles, Tensor scales, Tensor? zeros, Tensor? perm"
_TILED = "int bits, int group_size, int in_features, int out_features"


_define(
    "repack_tiles",
    "Tensor qweight, Tensor? perm, int bits, int group_size",
    reference.repack_tiles,
)


@torch.library.register_fake("auto_gptq::repack_tiles", lib=_library)
def _(qweight: Tensor, perm: Tensor | None, bits: int, group_size: int) -> Tensor:
    in_features, out_features = qweight.shape[0] // bits * 32, qweight.shape[1]
    return qweight.new_empty((-(-out_features // 64), -(-in_features // 64), 128 * bits))


_define("unrepack_tiles", f"Tensor tiles, Tensor? perm, {_TILED}", reference.unrepack_tiles)


@torch.library.register_fake("auto_gptq::unrepack_tiles", lib=_library)
def _(
    tiles: Tensor,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    return tiles.new_empty((in_features // 32 * bits, out_features))


# Without perm the columns stay sorted by group.
_define("dequantize_tiles", f"{_TILES}, {_TILED}, ScalarType dtype", reference.dequantize_tiles)


@torch.library.register_fake("auto_gptq::dequantize_tiles", lib=_library)
def _(
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return tiles.new_empty((out_features, in_features), dtype=dtype)


_define("q_matmul", f"Tensor x, {_TILES}, Tensor? bias, {_TILED}", reference.q_matmul)


@torch.library.register_fake("auto_gptq::q_matmul", lib=_library)
def _fake_q_matmul(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


# The same with x in 8 bits.
_define("q_matmul_int8", f"Tensor x, {_TILES}, Tensor? bias, {_TILED}", reference.q_matmul_int8)
torch.library.register_fake("auto_gptq::q_matmul_int8", _fake_q_matmul, lib=_library)


def _keep_tiles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.settings = inputs[6:]


def _backward_tiles(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.auto_gptq.dequantize_tiles(*ctx.saved_tensors, *ctx.settings, grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
    return grad @ weight, None, None, None, None, grad_bias, None, None, None, None


for _name in ("q_matmul", "q_matmul_int8"):
    torch.library.register_autograd(
        f"auto_gptq::{_name}", _backward_tiles, setup_context=_keep_tiles, lib=_library
    )
