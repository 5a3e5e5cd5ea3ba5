"""Products with weights in tiles for GPUs that the compiled library does not serve, in Triton.

A kernel reads words as ``[R, C]``: R rows ``(n tile, row tile, l / 4)``, two outputs each, and C
columns ``(k tile, q, s)``. The eight codes of such a word, of input i = 0..3 and output h = 0, 1,
are eight matrices [R, C]: each is multiplied with the activations of its own inputs, and nothing is
moved between threads. formats/tiles.py has the picture of the layout and these letters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats.tiles import SIDE, run_length

_ROWS = 32  # of words in one column of tiles


@triton.jit
def _field(tile, row_tile, lane, s, i: tl.constexpr, h: tl.constexpr, BITS: tl.constexpr, mask):
    """Read the codes of input i and output h of each lane and step."""
    half: tl.constexpr = i % 2 * 16
    if BITS == 8:
        word = tl.load(
            tile + row_tile * 256 + s // 2 * 128 + lane * 4 + s % 2 * 2 + i // 2, mask, 0
        )
        return (word >> (half + 8 * h)) & 255
    if BITS == 4:
        word = tl.load(tile + row_tile * 128 + lane * 4 + s, mask, 0)
        return (word >> (half + i // 2 * 8 + 4 * h)) & 15
    pair = s * 4 + i // 2 * 2 + h
    low = tl.load(tile + row_tile * 64 + lane * 2 + s // 2, mask, 0)
    code = (low >> (half + pair % 8 * 2)) & 3
    if BITS == 3:
        field = pair % 8
        high = tl.load(tile + 256 + row_tile * 32 + lane, mask, 0)
        bit = half + (2 + field % 4 * 2 + field // 4 + pair // 8 * 8) % 16
        code = code | (((high >> bit) & 1) << 2)
    return code


@triton.jit
def _grid(scales, zeros, place, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, mask):
    """Give scale and zero point of an output for each word, in fp32."""
    zero = tl.load(zeros + place, mask, 0).to(tl.float32) if HAS_ZEROS else 1 << (BITS - 1)
    return tl.load(scales + place, mask, 0).to(tl.float32), zero


@triton.jit
def _input(perm, k, inside, HAS_PERM: tl.constexpr):
    """Give the input that lies at each place."""
    return tl.load(perm + k, inside, 0) if HAS_PERM else k


@triton.jit
def _rows_of(first_tile, R: tl.constexpr):
    """Give n tile, row tile, l / 4 and the first output of each row of words."""
    row = tl.arange(0, R)
    n_tile = first_tile + row // 32
    return n_tile, row // 8 % 4, row % 8, n_tile * 64 + row // 8 % 4 * 16 + row % 8


@triton.jit
def _columns_of(first_tile, C: tl.constexpr, RUN: tl.constexpr):
    """Give k tile, q, s and the first input of each column of words."""
    column = tl.arange(0, C)
    k_tile, q, s = first_tile + column // 16, column // 4 % 4, column % 4
    steps: tl.constexpr = RUN // 16
    k = k_tile * 64 + s // steps * RUN + q * (RUN // 4) + s % steps * 4
    return k_tile, q, s, k


@triton.jit
def _multiply_one(
    x, tiles, scales, zeros, perm, partial,
    m, in_features, n_tiles, k_tiles, group_size, tiles_per_split,
    BITS: tl.constexpr, RUN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_PERM: tl.constexpr,
    ONE_GROUP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Write the sums of one row over a part of the inputs into ``partial [splits, m, N']`` fp32."""
    n_tile, row_tile, l4, n = _rows_of(tl.program_id(0) * (R // 32), R)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, k_tiles)
    row = tl.program_id(2).to(tl.int64)
    sum0 = tl.zeros((R, C), tl.float32)
    sum1 = tl.zeros((R, C), tl.float32)
    for k_first in range(first, last, C // 16):
        k_tile, q, s, k = _columns_of(k_first, C, RUN)
        mask = (n_tile < n_tiles)[:, None] & (k_tile < last)[None, :]
        tile = tiles + (n_tile[:, None] * k_tiles + k_tile[None, :]).to(tl.int64) * (128 * BITS)
        lane = l4[:, None] * 4 + q[None, :]
        if ONE_GROUP:  # a column of scales for all columns of words
            place = (k_first * 64 // group_size * (n_tiles * 64) + n)[:, None]
            known = (n_tile < n_tiles)[:, None]
        else:
            place = k[None, :] // group_size * (n_tiles * 64) + n[:, None]
            known = mask
        scale0, zero0 = _grid(scales, zeros, place, BITS, HAS_ZEROS, known)
        scale1, zero1 = _grid(scales, zeros, place + 8, BITS, HAS_ZEROS, known)
        group0 = tl.zeros((R, C), tl.float32)
        group1 = tl.zeros((R, C), tl.float32)
        for i in tl.static_range(4):
            inside = (k_tile < last) & (k + i < in_features)
            source = _input(perm, k + i, inside, HAS_PERM)
            code0 = _field(tile, row_tile[:, None], lane, s[None, :], i, 0, BITS, mask) - zero0
            code1 = _field(tile, row_tile[:, None], lane, s[None, :], i, 1, BITS, mask) - zero1
            given = tl.load(x + row * in_features + source, inside, 0).to(tl.float32)
            group0 += code0 * given[None, :]
            group1 += code1 * given[None, :]
        sum0 += group0 * scale0
        sum1 += group1 * scale1
    out = partial + (tl.program_id(1).to(tl.int64) * m + row) * n_tiles * 64 + n
    tl.store(out, tl.sum(sum0, 1), n_tile < n_tiles)
    tl.store(out + 8, tl.sum(sum1, 1), n_tile < n_tiles)


@triton.jit
def _multiply_some(
    x, tiles, scales, zeros, perm, partial,
    m, in_features, n_tiles, k_tiles, group_size, tiles_per_split,
    BITS: tl.constexpr, RUN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_PERM: tl.constexpr,
    ONE_GROUP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Write the sums of M rows over a part of the inputs into ``partial [splits, m, N']`` fp32."""
    n_tile, row_tile, l4, n = _rows_of(tl.program_id(0) * (R // 32), R)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, k_tiles)
    rows = tl.program_id(2) * M + tl.arange(0, M)
    used = (rows < m)[None, :]
    dtype = x.dtype.element_ty
    sum0 = tl.zeros((R, M), tl.float32)
    sum1 = tl.zeros((R, M), tl.float32)
    for k_first in range(first, last, C // 16):
        k_tile, q, s, k = _columns_of(k_first, C, RUN)
        mask = (n_tile < n_tiles)[:, None] & (k_tile < last)[None, :]
        tile = tiles + (n_tile[:, None] * k_tiles + k_tile[None, :]).to(tl.int64) * (128 * BITS)
        lane = l4[:, None] * 4 + q[None, :]
        if ONE_GROUP:  # a column of scales for all columns of words
            place = (k_first * 64 // group_size * (n_tiles * 64) + n)[:, None]
            known = (n_tile < n_tiles)[:, None]
        else:
            place = k[None, :] // group_size * (n_tiles * 64) + n[:, None]
            known = mask
        scale0, zero0 = _grid(scales, zeros, place, BITS, HAS_ZEROS, known)
        scale1, zero1 = _grid(scales, zeros, place + 8, BITS, HAS_ZEROS, known)
        group0 = tl.zeros((R, M), tl.float32)
        group1 = tl.zeros((R, M), tl.float32)
        for i in tl.static_range(4):
            inside = (k_tile < last) & (k + i < in_features)
            source = _input(perm, k + i, inside, HAS_PERM)
            code0 = _field(tile, row_tile[:, None], lane, s[None, :], i, 0, BITS, mask) - zero0
            code1 = _field(tile, row_tile[:, None], lane, s[None, :], i, 1, BITS, mask) - zero1
            if not ONE_GROUP:
                code0, code1 = code0 * scale0, code1 * scale1
            given = x + rows[None, :].to(tl.int64) * in_features + source[:, None]
            given = tl.load(given, inside[:, None] & used, 0)
            group0 = tl.dot(code0.to(dtype), given, group0, input_precision="ieee")
            group1 = tl.dot(code1.to(dtype), given, group1, input_precision="ieee")
        if ONE_GROUP:
            group0, group1 = group0 * scale0, group1 * scale1
        sum0 += group0
        sum1 += group1
    out = partial + tl.program_id(1).to(tl.int64) * m * n_tiles * 64
    out += rows[None, :].to(tl.int64) * (n_tiles * 64) + n[:, None]
    tl.store(out, sum0, (n_tile < n_tiles)[:, None] & used)
    tl.store(out + 8, sum1, (n_tile < n_tiles)[:, None] & used)


@triton.jit
def _dequantize(
    weight, tiles, scales, zeros, perm,
    in_features, out_features, n_tiles, k_tiles, group_size,
    BITS: tl.constexpr, RUN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_PERM: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write the dense weight ``[N, K]``."""
    n_tile, row_tile, l4, n = _rows_of(tl.program_id(0) * (R // 32), R)
    k_tile, q, s, k = _columns_of(tl.program_id(1) * (C // 16), C, RUN)
    mask = (n_tile < n_tiles)[:, None] & (k_tile < k_tiles)[None, :]
    tile = (n_tile[:, None] * k_tiles + k_tile[None, :]).to(tl.int64) * (128 * BITS)
    lane = l4[:, None] * 4 + q[None, :]
    for h in tl.static_range(2):
        row = n + 8 * h
        place = k[None, :] // group_size * (n_tiles * 64) + row[:, None]
        scale, zero = _grid(scales, zeros, place, BITS, HAS_ZEROS, mask)
        for i in tl.static_range(4):
            inside = (k_tile < k_tiles) & (k + i < in_features)
            source = _input(perm, k + i, inside, HAS_PERM)
            code = _field(tiles + tile, row_tile[:, None], lane, s[None, :], i, h, BITS, mask)
            found = ((code - zero) * scale).to(weight.dtype.element_ty)
            held = mask & inside[None, :] & (row < out_features)[:, None]
            tl.store(weight + row[:, None].to(tl.int64) * in_features + source, found, held)


class _Config(NamedTuple):
    """How a product of some rows is cut up."""

    most_m: int
    m: int  # rows of x for one program
    r: int  # rows of words, of two outputs each
    c: int  # columns of words, of four inputs each
    warps: int
    stages: int  # iterations whose loads are in flight
    dot: bool
    per_core: int  # programs for each multiprocessor, if there are enough inputs to share


# Measured on an H100. The first that takes the rows is used; for more, the weight is unfolded.
_CONFIGS = (
    _Config(2, 1, 32, 64, 4, 3, dot=False, per_core=4),
    _Config(16, 16, 64, 64, 4, 3, dot=True, per_core=4),
    _Config(32, 32, 64, 64, 4, 3, dot=True, per_core=4),
    _Config(64, 64, 64, 64, 4, 3, dot=True, per_core=4),
)


def q_matmul(
    x: Tensor,  # [..., K]
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:  # [..., N]
    """Multiply by a weight in tiles."""
    rows = x.reshape(-1, in_features).contiguous()
    config = next((each for each in _CONFIGS if len(rows) <= each.most_m), None)
    if config is None:
        settings = bits, group_size, in_features, out_features
        weight = dequantize_tiles(tiles, scales, zeros, perm, *settings, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    partial = _partial_sums(config, rows, tiles, scales, zeros, perm, bits, group_size)
    total = partial[0] if len(partial) == 1 else partial.sum(0)
    total = total[:, :out_features]
    if bias is not None:
        total = total + bias
    return total.to(x.dtype).reshape(*x.shape[:-1], out_features)


def _partial_sums(
    config: _Config,
    rows: Tensor,  # [m, K]
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:  # [splits, m, N'] fp32
    (m, in_features), (n_tiles, k_tiles) = rows.shape, tiles.shape[:2]
    group_size = _group(group_size, in_features)
    # As many columns as lie in one group, if whole tiles do: their scales are read once.
    c = next((c for c in (64, 32, 16) if c <= config.c and group_size % (4 * c) == 0), None)
    if group_size == in_features:
        c = config.c
    one_group, c = c is not None, c or config.c
    columns = triton.cdiv(n_tiles * _ROWS, config.r)
    blocks = triton.cdiv(m, config.m)
    steps = triton.cdiv(k_tiles, c // 16)
    splits = max(1, min(steps, config.per_core * _cores(rows.device) // (columns * blocks)))
    steps_per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_per_split)
    partial = rows.new_empty((splits, m, n_tiles * SIDE), dtype=torch.float32)
    kernel = _multiply_some if config.dot else _multiply_one
    kernel[columns, splits, blocks](
        rows,
        tiles,
        scales.contiguous(),
        tiles if zeros is None else zeros.contiguous(),
        tiles if perm is None else perm,
        partial,
        m,
        in_features,
        n_tiles,
        k_tiles,
        group_size,
        steps_per_split * (c // 16),
        BITS=bits,
        RUN=run_length(group_size, in_features),
        HAS_ZEROS=zeros is not None,
        HAS_PERM=perm is not None,
        ONE_GROUP=one_group,
        R=config.r,
        C=c,
        M=config.m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return partial


def dequantize_tiles(
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """Give the dense weight."""
    n_tiles, k_tiles = tiles.shape[:2]
    weight = tiles.new_empty((out_features, in_features), dtype=dtype)
    _dequantize[n_tiles, triton.cdiv(k_tiles, 4)](
        weight,
        tiles,
        scales.contiguous(),
        tiles if zeros is None else zeros.contiguous(),
        tiles if perm is None else perm,
        in_features,
        out_features,
        n_tiles,
        k_tiles,
        _group(group_size, in_features),
        BITS=bits,
        RUN=run_length(group_size, in_features),
        HAS_ZEROS=zeros is not None,
        HAS_PERM=perm is not None,
        R=_ROWS,
        C=64,
    )
    return weight


def _group(group_size: int, in_features: int) -> int:
    return in_features if group_size == -1 else group_size


def _cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_library = torch.library.Library("auto_gptq", "IMPL")


def register() -> None:
    """Serve ``q_matmul`` and ``dequantize_tiles`` on CUDA and ROCm devices."""
    _library.impl("q_matmul", q_matmul, "CUDA")
    _library.impl("dequantize_tiles", dequantize_tiles, "CUDA")
