"""The layout that the fast kernels read: codes in the order in which tensor cores take them.

In memory only, made from the tensors of :mod:`.gptq` and turned back into them bit for bit.

A *tile* is 64 outputs by 64 inputs, and tiles lie ``[N / 64, K / 64]``.  One tile is, plane after
plane, ``[4 row tiles of 16 outputs][vectors][32 lanes][words of a vector]`` int32, so a warp reads
whole vectors of 4, 8 or 16 bytes per lane, side by side.  Lane ``l`` holds the codes of the outputs
``r0 = l / 4`` and ``r1 = r0 + 8`` of its row tile for 16 inputs, four for each of four *steps*:
what lane ``l`` of ``mma.m16n8k16`` holds of A (and of a warp's part of ``wgmma``).

Steps.  Inputs that share a scale come in *runs* of 64, 32 or 16: the largest power of two that
divides the group size, and 64 if there is only one group.  A step never leaves its run::

    input = s / (run / 16) * run + q * run / 4 + s % (run / 16) * 4 + i        q = l % 4

    run 64:   q = 0            1            2            3
              s0 s1 s2 s3      s0 s1 s2 s3  s0 s1 s2 s3  s0 s1 s2 s3    (i = 0..3 each)
    run 16:   s = 0            1            2            3
              q0 q1 q2 q3      q0 q1 q2 q3  q0 q1 q2 q3  q0 q1 q2 q3

so with runs of 64 the activations that a lane needs are 16 neighbours, 32 bytes.

Words of a lane, the low bits first; the upper half holds i = 1 and 3 where the lower half has 0
and 2, so that one ``(word >> shift) & mask`` gives a pair of codes 16 bits apart::

    4 bits, word s:              r0i0 r1i0 r0i2 r1i2 | r0i1 r1i1 r0i3 r1i3
    8 bits, word 2s (+1):        r0i0 r1i0           | r0i1 r1i1             (i + 2)
    2 bits, word s / 2:          of s % 2 = 0: r0i0 r1i0 r0i2 r1i2; then of s % 2 = 1 | ...
    3 bits: a plane of the lower two bits as with 2 bits, then a plane of the highest bits, one
            word per lane: field f = 0..7 of word w is bit (2 + 2 (f % 4) + f / 4 + 8 w) % 16 of a
            half, which leaves it just above its lower bits after few shifts

A CPU multiplies vectors of as many outputs as there are lanes.  In its memory the words of a 4-bit
tile lie ``[2 pairs of row tiles][step][q][row tile of the pair][l / 4]``: 16 words side by side are
of 16 outputs r0, and r1, and the same four inputs.  So where a tensor is says how its words lie.

K and N are padded to whole tiles with codes of 0 and scales of 0.  Padded outputs are cut off.  A
padded input contributes nothing because kernels take its activation for 0, whatever the zero point.

Act-order: inputs are sorted by group, stably, and ``perm[j]`` is the input at place ``j``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gptq import (
    GPTQTensors,
    group_count,
    pack_zeros,
    trivial_g_idx,
    unpack_codes,
    unpack_zeros,
)
from .packing import pack

SIDE = 64  # of a tile
_STEPS, _ROW_TILES, _LANES = 4, 4, 32


@dataclass(frozen=True)
class TileTensors:
    """One linear's weight in tiles; N' is N padded to whole tiles, K' is K padded."""

    tiles: Tensor  # [N' / 64, K' / 64, 128 * bits] int32
    scales: Tensor  # [G, N'] in the dtype of the checkpoint
    zeros: Tensor | None  # [G, N'] uint8; None if each is 2**(bits - 1)
    perm: Tensor | None  # [K] int32; None if the groups are contiguous


def run_length(group_size: int, in_features: int) -> int:
    """Give the number of neighbouring inputs that surely share a scale: 16, 32 or 64."""
    if group_count(in_features, group_size) == 1:
        return SIDE
    return min(SIDE, group_size & -group_size)


def find_obstacle(bits: int, group_size: int) -> str | None:
    """Say why a weight cannot be held in tiles, or None if it can."""
    if bits not in _PLANES:
        return f"bits is {bits}, not 2, 3, 4 or 8"
    if group_size != -1 and group_size % 16:
        return f"group_size is {group_size}, which is not a multiple of 16"
    return None


def sort_groups(g_idx: Tensor, group_size: int) -> tuple[Tensor | None, str | None]:
    """Give the order that makes groups contiguous (None if they are), and why there is none."""
    trivial = trivial_g_idx(g_idx.shape[0], group_size, g_idx.device)
    if torch.equal(g_idx, trivial):
        return None, None
    ordered, perm = torch.sort(g_idx, stable=True)
    if not torch.equal(ordered, trivial):
        return None, f"g_idx does not give each group {group_size} inputs"
    return perm.to(torch.int32), None


def to_tiles(packed: GPTQTensors, bits: int, group_size: int, zero_offset: int) -> TileTensors:
    """Lay a checkpoint's tensors out in tiles.

    :raises ValueError: saying why that cannot be; ask :func:`find_obstacle` and
        :func:`sort_groups` first
    """
    perm, unsorted = sort_groups(packed.g_idx, group_size)
    obstacle = find_obstacle(bits, group_size) or unsorted
    if obstacle is not None:
        raise ValueError(f"The weight cannot be laid out in tiles: {obstacle}.")
    return TileTensors(
        tile_codes(packed.qweight, perm, bits, group_size),
        pad(packed.scales, 1),
        tile_zeros(packed.qzeros, bits, zero_offset),
        perm,
    )


def from_tiles(
    tiled: TileTensors,
    bits: int,
    group_size: int,
    zero_offset: int,
    shape: tuple[int, int],  # K, N
) -> GPTQTensors:
    """Undo :func:`to_tiles`, bit for bit."""
    return GPTQTensors(
        untile_codes(tiled.tiles, tiled.perm, bits, group_size, shape),
        untile_zeros(tiled, bits, zero_offset, shape[1]),
        untile_scales(tiled, shape[1]),
        untile_g_idx(tiled, group_size, shape[0]),
    )


def tile_codes(
    qweight: Tensor,  # [K / 32 * bits, N] int32
    perm: Tensor | None,  # [K] int32
    bits: int,
    group_size: int,
) -> Tensor:  # [N' / 64, K' / 64, 128 * bits] int32
    """Lay packed codes out in tiles."""
    codes = unpack_codes(qweight, bits)
    order = _order(run_length(group_size, codes.shape[0]), codes.device)
    if perm is not None:
        codes = codes[perm.long()]
    codes = pad(pad(codes, 0), 1).to(torch.int32)
    # [K' / 64, step, q, i, N' / 64, row tile, r0 or r1, l / 4]
    codes = codes.unflatten(1, (-1, _ROW_TILES, 2, 8)).unflatten(0, (-1, SIDE))[:, order]
    planes = []
    for plane in _PLANES[bits]:
        shape = codes.shape[4], codes.shape[0], _ROW_TILES, _LANES, plane.words
        words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
        for s, i, h, place in plane.places():
            part = codes[:, s, :, i, :, :, h]  # [K' / 64, q, N' / 64, row tile, l / 4]
            field = (part >> plane.first_bit) & ((1 << plane.bits) - 1)
            lanes = field.permute(2, 0, 3, 4, 1).flatten(3)
            words[..., place.word] |= lanes << place.bit
        vector = min(plane.words, 4)
        planes.append(words.unflatten(4, (-1, vector)).transpose(3, 4).flatten(2))
    tiles = torch.cat(planes, 2)
    return order_for_cpu(tiles) if _is_for_cpu(qweight, bits) else tiles


def _is_for_cpu(tensor: Tensor, bits: int) -> bool:
    """Whether a tile's words lie, or are to lie, in the CPU's own order."""
    return bits == 4 and tensor.device.type == "cpu"


def order_for_cpu(tiles: Tensor) -> Tensor:  # [..., 512], 4 bits
    """Turn words in the order of lanes into the CPU's."""
    words: Tensor = tiles.unflatten(-1, (2, 2, 8, 4, 4))  # pair, row tile, l / 4, q, step
    return words.movedim((-1, -2), (-4, -3)).flatten(-5)


def order_for_lanes(tiles: Tensor) -> Tensor:  # [..., 512], 4 bits
    """Undo :func:`order_for_cpu`."""
    words: Tensor = tiles.unflatten(-1, (2, 4, 4, 2, 8))  # pair, step, q, row tile, l / 4
    return words.movedim((-4, -3), (-1, -2)).flatten(-5)


def untile_codes(
    tiles: Tensor,  # [N' / 64, K' / 64, 128 * bits] int32
    perm: Tensor | None,
    bits: int,
    group_size: int,
    shape: tuple[int, int],  # K, N
) -> Tensor:  # [K / 32 * bits, N] int32
    """Undo :func:`tile_codes`."""
    codes = read_codes(tiles, bits, group_size, shape)
    if perm is not None:
        codes = torch.empty_like(codes).index_copy_(0, perm.long(), codes)
    return pack(codes, bits)


def read_codes(
    tiles: Tensor,  # [N' / 64, K' / 64, 128 * bits] int32
    bits: int,
    group_size: int,
    shape: tuple[int, int],  # K, N
) -> Tensor:  # [K, N] uint8, sorted by group
    """Give the codes of tiles, in the order of the tiles' inputs."""
    n_tiles, k_tiles = tiles.shape[:2]
    if _is_for_cpu(tiles, bits):
        tiles = order_for_lanes(tiles)
    size = (k_tiles, _STEPS, 4, 4, n_tiles, _ROW_TILES, 2, 8)
    codes = torch.zeros(size, dtype=torch.uint8, device=tiles.device)
    at = 0
    for plane in _PLANES[bits]:
        vector = min(plane.words, 4)
        count = _ROW_TILES * _LANES * plane.words
        words = tiles[..., at : at + count].unflatten(2, (_ROW_TILES, -1, _LANES, vector))
        words = words.transpose(3, 4).flatten(4)  # [N' / 64, K' / 64, row tile, lane, word]
        at += count
        for s, i, h, place in plane.places():
            # >> copies the sign bit downwards; & takes away what it copied.
            field = (words[..., place.word] >> place.bit) & ((1 << plane.bits) - 1)
            lanes = field.to(torch.uint8).unflatten(3, (8, 4)) << plane.first_bit
            codes[:, s, :, i, :, :, h] |= lanes.permute(1, 4, 0, 2, 3)
    order = _order(run_length(group_size, shape[0]), tiles.device).flatten()
    rows = torch.empty_like(codes).view(k_tiles, SIDE, -1)
    rows[:, order] = codes.view(k_tiles, SIDE, -1)
    return rows.flatten(0, 1)[: shape[0], : shape[1]]


def tile_zeros(qzeros: Tensor, bits: int, zero_offset: int) -> Tensor | None:  # [G, N'] uint8
    """Give the zero points, or None if each is the middle code."""
    zeros = pad(unpack_zeros(qzeros, bits, zero_offset).to(torch.uint8), 1)
    middle = zeros[:, : qzeros.shape[1] * 32 // bits] == 1 << (bits - 1)
    return None if bool(middle.all()) else zeros


def untile_zeros(tiled: TileTensors, bits: int, zero_offset: int, out_features: int) -> Tensor:
    """Undo :func:`tile_zeros`: give ``qzeros [G, N / 32 * bits]`` int32."""
    if tiled.zeros is None:
        shape = tiled.scales.shape[0], out_features
        zeros = torch.full(shape, 1 << (bits - 1), dtype=torch.int32, device=tiled.tiles.device)
    else:
        zeros = tiled.zeros[:, :out_features].to(torch.int32)
    return pack_zeros((zeros - zero_offset) & ((1 << bits) - 1), bits)


def untile_scales(tiled: TileTensors, out_features: int) -> Tensor:  # [G, N]
    """Cut the padding off the scales."""
    return tiled.scales[:, :out_features].contiguous()


def untile_g_idx(tiled: TileTensors, group_size: int, in_features: int) -> Tensor:  # [K] int32
    """Give the group of each input."""
    g_idx = trivial_g_idx(in_features, group_size, tiled.tiles.device)
    if tiled.perm is None:
        return g_idx
    return torch.empty_like(g_idx).scatter_(0, tiled.perm.long(), g_idx)


def pad(tensor: Tensor, dim: int) -> Tensor:
    """Fill a dimension of a matrix up to whole tiles with zeros; no copy if nothing is missing."""
    missing = -tensor.shape[dim] % SIDE
    if missing == 0:
        return tensor
    return F.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing))


class _Place(NamedTuple):
    """Where a lane keeps one code: the word, and the position of its lowest bit."""

    word: int
    bit: int


class _Plane(NamedTuple):
    """Some bits of every code."""

    bits: int
    first_bit: int  # the lowest bit of the code that lies here

    @property
    def words(self) -> int:
        """Words per lane: its 32 codes."""
        return self.bits

    def places(self) -> list[tuple[int, int, int, _Place]]:
        """Give step, i, 0 for r0 or 1 for r1, and the place of each of a lane's codes."""
        return [
            (s, i, h, self._place(s, i, h))
            for s in range(_STEPS)
            for i in range(4)
            for h in range(2)
        ]

    def _place(self, s: int, i: int, h: int) -> _Place:
        half = i % 2 * 16
        pair = s * 4 + i // 2 * 2 + h  # of the lane's 16 pairs
        if self.bits == 1:
            word, field = divmod(pair, 8)
            return _Place(0, half + (2 + field % 4 * 2 + field // 4 + 8 * word) % 16)
        word, field = divmod(pair, 16 // self.bits)
        return _Place(word, half + field * self.bits)


_PLANES = {
    2: (_Plane(2, 0),),
    3: (_Plane(2, 0), _Plane(1, 2)),
    4: (_Plane(4, 0),),
    8: (_Plane(8, 0),),
}


def place_order(run: int, in_features: int) -> Tensor:
    """Give the places of all tiles' inputs, padding included, one step of a tile after another."""
    tiles = -(-in_features // SIDE)
    order = torch.tensor(_order_of(run))
    return (torch.arange(tiles)[:, None] * SIDE + order).flatten()


@functools.cache
def _order_of(run: int) -> tuple[int, ...]:
    steps = run // 16  # of a run
    return tuple(
        s // steps * run + q * run // 4 + s % steps * 4 + i
        for s in range(_STEPS)
        for q in range(4)
        for i in range(4)
    )


def _order(run: int, device: torch.device) -> Tensor:  # [step, q, i]
    return torch.tensor(_order_of(run), device=device).view(_STEPS, 4, 4)
