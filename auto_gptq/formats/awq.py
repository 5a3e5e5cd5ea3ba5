"""AWQ's GEMM layout: 4-bit codes packed along N, eight columns of a word interleaved.

======== ============ ======= =================================================
tensor   shape        dtype   content
======== ============ ======= =================================================
qweight  [K, N / 8]   int32   codes, packed along N
qzeros   [G, N / 8]   int32   zero points as they are (no ``- 1``), packed alike
scales   [G, N]       fp16    as in GPTQ
======== ============ ======= =================================================

Bits 4 i to 4 i + 3 of word ``w`` hold column ``8 w + (0, 2, 4, 6, 1, 3, 5, 7)[i]``: even columns
in the low half, odd ones in the high half.  Codes are moved, never dequantized, so what a
checkpoint computes is kept to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack

BITS = 4


def unpack_columns(
    words: Tensor,  # [n, N / 8] int32
) -> Tensor:  # [n, N] uint8
    """Give the codes of AWQ's words in the order of columns."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & 0xF  # [n, N / 8, 8] in the order of bits
    halves: Tensor = codes.to(torch.uint8).unflatten(-1, (2, 4))  # even columns, odd columns
    return halves.transpose(-1, -2).flatten(1)


def from_awq_weight(
    qweight: Tensor,  # [K, N / 8]
) -> Tensor:  # [K / 8, N]
    """Repack AWQ's ``qweight`` as GPTQ's."""
    return pack(unpack_columns(qweight), BITS)


def from_awq_zeros(
    qzeros: Tensor,  # [G, N / 8]
) -> Tensor:  # [G, N / 8]
    """Repack AWQ's ``qzeros`` as gptq_v2's, which can hold a zero point of 0."""
    return pack(unpack_columns(qzeros).t(), BITS).t().contiguous()
