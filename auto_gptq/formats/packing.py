"""Pack 2, 3, 4 or 8-bit codes into int32 words and back.

One rule covers every width: 32 codes make ``bits`` words, read as one little-endian stream of bits
in which code ``i`` starts at bit ``bits * i``.  For 2, 4 and 8 bits no code crosses a word; for 3
bits codes 10 and 21 do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ModuleShapeError

CODES_PER_STREAM = 32  # the smallest run of codes that fills whole words at every width


class _Place(NamedTuple):
    """Where one code of a stream lies."""

    word: int  # index of the word that holds its lowest bit
    shift: int  # position of its lowest bit in that word
    spill: int  # number of its bits that continue in the next word


@functools.cache
def _places(bits: int) -> tuple[_Place, ...]:
    return tuple(
        _Place(bit // 32, bit % 32, max(0, bit % 32 + bits - 32))
        for bit in range(0, bits * CODES_PER_STREAM, bits)
    )


def pack(
    codes: Tensor,  # [n, ...] any integer dtype, every value in [0, 2**bits)
    bits: int,
) -> Tensor:  # [n / 32 * bits, ...] int32
    """Pack codes along the first dimension; ``n`` must be a multiple of 32.

    The range of the codes is the caller's promise: checking it would stop a GPU.
    """
    if codes.shape[0] % CODES_PER_STREAM:
        raise ModuleShapeError(
            f"{codes.shape[0]} codes of {bits} bits cannot be packed: "
            f"the packed dimension must be a multiple of {CODES_PER_STREAM}."
        )
    if 8 % bits == 0:
        return _pack_bytes(codes.to(torch.uint8), bits)
    streams = codes.to(torch.int32).unflatten(0, (-1, CODES_PER_STREAM))
    words = torch.zeros(
        (streams.shape[0], bits, *codes.shape[1:]), dtype=torch.int32, device=codes.device
    )
    for i, place in enumerate(_places(bits)):
        words[:, place.word] |= streams[:, i] << place.shift
        if place.spill:
            words[:, place.word + 1] |= streams[:, i] >> (bits - place.spill)
    return words.flatten(0, 1)


def _pack_bytes(
    codes: Tensor,  # [n, ...] uint8
    bits: int,
) -> Tensor:  # [n / 32 * bits, ...] int32
    """Pack codes of which whole numbers fill a byte: a quarter of the memory traffic of words."""
    streams = codes.unflatten(0, (-1, 4, 8 // bits))  # words, their bytes, codes in a byte
    packed = streams[:, :, 0].clone()
    for i in range(1, 8 // bits):
        packed |= streams[:, :, i] << (bits * i)
    # A clone, not contiguous(): that keeps the strides of dimensions of size 1, which view refuses.
    bytes_last = packed.movedim(1, -1).clone(memory_format=torch.contiguous_format)
    words: Tensor = bytes_last.view(torch.int32).squeeze(-1)
    return words


def unpack(
    words: Tensor,  # [n / 32 * bits, ...] int32
    bits: int,
) -> Tensor:  # [n, ...] uint8
    """Undo :func:`pack`."""
    if words.shape[0] % bits:
        raise ModuleShapeError(
            f"{words.shape[0]} words do not hold whole runs of {CODES_PER_STREAM} codes "
            f"of {bits} bits: their number must be a multiple of {bits}."
        )
    mask = (1 << bits) - 1
    if 32 % bits == 0:  # no code crosses a word: one shift for all
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        shifts = shifts.view(1, -1, *[1] * (words.dim() - 1))
        return ((words.unsqueeze(1) >> shifts) & mask).to(torch.uint8).flatten(0, 1)
    streams = words.unflatten(0, (-1, bits))
    codes = []
    for place in _places(bits):
        # >> copies the sign bit downwards, so the bits that came from outside the word go first.
        code = (streams[:, place.word] >> place.shift) & (mask >> place.spill)
        if place.spill:
            code |= (streams[:, place.word + 1] << (bits - place.spill)) & mask
        codes.append(code.to(torch.uint8))
    return torch.stack(codes, 1).flatten(0, 1)
