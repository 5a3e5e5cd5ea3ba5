"""Plain torch implementation of every operator: correct on every device, fast on none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.gptq import unpack_codes, unpack_zeros
from ..formats.grid import Grid


def dequantize(
    qweight: Tensor,  # [K / 32 * bits, N] int32
    qzeros: Tensor,  # [G, N / 32 * bits] int32
    scales: Tensor,  # [G, N]
    g_idx: Tensor,  # [K] int32
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """Give the dense weight, computed in fp32 and rounded once to ``dtype``."""
    codes = unpack_codes(qweight, bits)
    zeros = unpack_zeros(qzeros, bits, zero_offset)
    group = g_idx.to(torch.long)
    weight = (codes - zeros[group]).to(torch.float32) * scales.to(torch.float32)[group]
    return weight.to(dtype).t().contiguous()


def q_linear(
    x: Tensor,  # [..., K]
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,  # [N]
    bits: int,
    zero_offset: int,
) -> Tensor:  # [..., N] in the dtype of x
    """Multiply by the dequantized weight."""
    weight = dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def solve_columns(
    weight: Tensor,  # [B, N] fp32, a block of columns held transposed; updated in place
    inverse: Tensor,  # [B, B] fp32, upper triangular factor of the inverse Hessian
    scales: Tensor,  # [G, N] fp32
    zeros: Tensor,  # [G, N] fp32, whole numbers
    group: Tensor,  # [B] int64, the group of each column
    maxq: int,
) -> tuple[Tensor, Tensor]:  # codes [B, N] uint8; errors [B, N], divided by the diagonal
    """Quantize columns one after another, taking each one's error out of the later ones.

    (GPTQ, section 4, algorithm 1, the inner loop.)
    """
    codes = torch.empty_like(weight, dtype=torch.uint8)
    errors = torch.empty_like(weight)
    column_scales, column_zeros = scales[group], zeros[group]
    diagonal = inverse.diagonal()
    for i in range(weight.shape[0]):
        grid = Grid(column_scales[i], column_zeros[i], maxq)
        kept = grid.to_codes(weight[i])
        torch.div(weight[i] - grid.from_codes(kept), diagonal[i], out=errors[i])
        weight[i + 1 :].addr_(inverse[i, i + 1 :], errors[i], alpha=-1)
        codes[i] = kept
    return codes, errors


def choose_grid(
    weight: Tensor,  # [n, N] fp32, a group of columns held transposed
    importance: Tensor,  # [n] fp32, weight of each column's squared error
    scales: Tensor,  # [F, N] fp32, candidates
    zeros: Tensor,  # [F, N] fp32, whole numbers
    maxq: int,
) -> Tensor:  # [N] int64
    """Give, for each output, the first of the grids with the least weighted squared error."""
    errors = []
    for scale, zero in zip(scales, zeros, strict=True):
        grid = Grid(scale, zero, maxq)
        errors.append(importance @ (weight - grid.from_codes(grid.to_codes(weight))).square())
    return torch.stack(errors).argmin(0)
