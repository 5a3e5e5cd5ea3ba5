"""The solver's two inner loops in Triton, for GPUs that the compiled library does not serve.

Import this module only where Triton is installed; :mod:`.gpu` asks for that.  What each computes is
said in :mod:`.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 8  # of a program: with one warp, what measured best for 128 columns
_MOST_COLUMNS = 128
_FIT_OUTPUTS = 32
_FIT_COLUMNS = 32  # read at a time
_SMALLEST = {  # the smallest and largest scale that a dtype can store
    torch.float16: (2.0**-24, 65504.0),
    torch.bfloat16: (2.0**-133, torch.finfo(torch.bfloat16).max),
    torch.float32: (2.0**-149, torch.finfo(torch.float32).max),
}
_STORED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _round(x):
    # Half to even, by the limits of fp32's mantissa; what is larger is clamped afterwards anyway.
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _solve_columns(
    weight,  # [B, N] fp32, updated in place
    codes,  # [B, N] uint8
    errors,  # [B, N] fp32
    inverse,  # [B, B] fp32
    scales,  # [G, N] fp32
    zeros,  # [G, N] fp32
    group,  # [B] int64
    n,
    weight_stride,
    inverse_stride,
    maxq,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two above
    OUTPUTS: tl.constexpr,
):
    rows = tl.arange(0, COLUMNS)
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = out < n
    present = rows < B
    at = rows.to(tl.int64)[:, None] * weight_stride + out[None, :]
    mask = present[:, None] & inside[None, :]
    w = tl.load(weight + at, mask=mask, other=0.0)
    for i in range(B):
        of_group = tl.load(group + i) * n + out
        scale = tl.load(scales + of_group, mask=inside, other=1.0)
        zero = tl.load(zeros + of_group, mask=inside, other=0.0)
        later = tl.load(inverse + i * inverse_stride + rows, mask=present & (rows > i), other=0.0)
        diagonal = tl.load(inverse + i * inverse_stride + i)
        now = tl.sum(tl.where((rows == i)[:, None], w, 0.0), axis=0)
        code = _round(tl.math.div_rn(now, scale)) + zero
        code = tl.minimum(tl.maximum(code, 0.0), maxq)
        error = tl.math.div_rn(now - (code - zero) * scale, diagonal + tl.zeros_like(now))
        w -= later[:, None] * error[None, :]
        tl.store(codes + i * n + out, code.to(tl.uint8), mask=inside)
        tl.store(errors + i * n + out, error, mask=inside)
    tl.store(weight + at, w, mask=mask)


@triton.jit
def _storable(scale, smallest, largest, STORED: tl.constexpr):
    rounded = tl.minimum(tl.maximum(scale, smallest), largest).to(STORED).to(tl.float32)
    return tl.where(scale > 0.0, rounded, 1.0)


@triton.jit
def _fit_grids(
    weight,  # [n, N] fp32
    importance,  # [n] fp32
    factors,  # [F] fp32
    scales,  # out [G, N] fp32
    zeros,  # out [G, N] fp32
    columns,
    n,
    weight_stride,
    maxq,
    lowest_zero,
    smallest,
    largest,
    GROUP: tl.constexpr,  # columns
    TRIED: tl.constexpr,  # factors
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = out < n
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, columns)
    least = tl.zeros([OUTPUTS], tl.float32)
    most = tl.zeros([OUTPUTS], tl.float32)
    for start in range(0, GROUP, COLUMNS):
        rows = first + start + tl.arange(0, COLUMNS)
        at = rows.to(tl.int64)[:, None] * weight_stride + out[None, :]
        w = tl.load(weight + at, mask=(rows < last)[:, None] & inside[None, :], other=0.0)
        least = tl.minimum(least, tl.min(w, axis=0))
        most = tl.maximum(most, tl.max(w, axis=0))
    best = tl.full([OUTPUTS], float("inf"), tl.float32)
    best_scale = tl.full([OUTPUTS], 1.0, tl.float32)
    best_zero = tl.zeros([OUTPUTS], tl.float32)
    for f in range(TRIED):
        factor = tl.load(factors + f)
        low = tl.minimum(least * factor, most * factor)
        high = tl.maximum(least * factor, most * factor)
        if SYMMETRIC:
            scale = _storable(
                tl.maximum(-low, high) * tl.math.div_rn(2.0, maxq), smallest, largest, STORED
            )
            zero = tl.zeros_like(scale) + (maxq + 1.0) / 2.0
        else:
            scale = tl.maximum(
                tl.math.div_rn(high - low, maxq + tl.zeros_like(low)),
                tl.math.div_rn(high, maxq - lowest_zero + tl.zeros_like(low)),
            )
            scale = _storable(scale, smallest, largest, STORED)
            zero = tl.minimum(tl.maximum(_round(tl.math.div_rn(-low, scale)), lowest_zero), maxq)
        scale = tl.where(factor > 0.0, scale, -scale)
        error = tl.zeros([OUTPUTS], tl.float32)
        for start in range(0, GROUP, COLUMNS):
            rows = first + start + tl.arange(0, COLUMNS)
            at = rows.to(tl.int64)[:, None] * weight_stride + out[None, :]
            w = tl.load(weight + at, mask=(rows < last)[:, None] & inside[None, :], other=0.0)
            weighs = tl.load(importance + rows, mask=rows < last, other=0.0)
            code = _round(tl.math.div_rn(w, tl.zeros_like(w) + scale[None, :])) + zero[None, :]
            code = tl.minimum(tl.maximum(code, 0.0), maxq)
            missed = w - (code - zero[None, :]) * scale[None, :]
            error += tl.sum(weighs[:, None] * (missed * missed), axis=0)
        better = error < best
        best = tl.where(better, error, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    to = tl.program_id(1) * n + out
    tl.store(scales + to, best_scale, mask=inside)
    tl.store(zeros + to, best_zero, mask=inside)


def solve_columns(
    weight: Tensor,
    codes: Tensor,
    errors: Tensor,
    inverse: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    maxq: int,
) -> None:
    """Do what :func:`.reference.solve_columns` does."""
    columns, n = weight.shape
    if columns > _MOST_COLUMNS or not all(x.stride(-1) == 1 for x in (weight, inverse)):
        raise ValueError(
            f"{columns} columns, at most {_MOST_COLUMNS} and contiguous rows are possible."
        )
    _solve_columns[(triton.cdiv(n, _OUTPUTS),)](
        weight,
        codes,
        errors,
        inverse,
        scales,
        zeros,
        group,
        n,
        weight.stride(0),
        inverse.stride(0),
        float(maxq),
        B=columns,
        COLUMNS=triton.next_power_of_2(columns),
        OUTPUTS=_OUTPUTS,
        num_warps=1,
    )


def fit_grids(
    weight: Tensor,
    importance: Tensor,
    factors: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    lowest_zero: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`.reference.fit_grids` does."""
    columns, n = weight.shape
    groups = triton.cdiv(columns, group_size)
    scales, zeros = weight.new_empty(groups, n), weight.new_empty(groups, n)
    smallest, largest = _SMALLEST[scale_dtype]
    _fit_grids[(triton.cdiv(n, _FIT_OUTPUTS), groups)](
        weight,
        importance,
        factors,
        scales,
        zeros,
        columns,
        n,
        weight.stride(0),
        float((1 << bits) - 1),
        float(lowest_zero),
        smallest,
        largest,
        GROUP=min(group_size, columns),
        TRIED=len(factors),
        SYMMETRIC=symmetric,
        STORED=_STORED[scale_dtype],
        COLUMNS=_FIT_COLUMNS,
        OUTPUTS=_FIT_OUTPUTS,
        num_warps=4,
    )
    return scales, zeros
