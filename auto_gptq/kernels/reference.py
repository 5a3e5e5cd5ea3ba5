"""Plain torch implementation of every operator: correct on every device, fast on none."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from ..formats.gptq import unpack_codes, unpack_zeros


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
