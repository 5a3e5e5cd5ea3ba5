"""The Marlin layout: 4-bit codes in the order in which a tensor core's threads take them.

======== ============== ======= =====================================================
tensor   shape          dtype   content
======== ============== ======= =====================================================
B        [K / 16, 2 N]  int32   codes, 8 a word; every zero point is 8 and not stored
s        [G, N]         fp16    scales, permuted along N
======== ============== ======= =====================================================

The unit is a piece of 16 rows (along K) and 64 columns (along N), four 16 x 16 tiles side by side,
which one warp multiplies in one go::

                 tile j = 0       j = 1       j = 2       j = 3
               c=0..7 c=0..7
              +------+------+ +-----------+ ...
      h = 0   | b=0  | b=1  |               row    = 8 h + 2 t + l
      (8 rows)|      |      |               column = 16 j + 8 b + c
              +------+------+
      h = 1   | b=0  | b=1  |               t, c: 0..3, 0..7     h, l, b: 0, 1
      (8 rows)|      |      |
              +------+------+ ...

Thread ``4 c + t`` of the warp holds rows ``2 t, 2 t + 1`` of both halves and column ``c`` of both
blocks of each tile: 8 codes a tile, one word.  So a piece lies there ordered by ``(c, t, j)``, and
inside a word, from the low bits up, by ``(l, b, h)``: two codes 16 bits apart are neighbouring
rows, which is how the kernel turns them into a pair of halves with one mask.  Hence no table of
1024 places is needed: the layout is a reordering of dimensions.
"""

from __future__ import annotations

from torch import Tensor

from .packing import pack, unpack

BITS = 4
GROUP_SIZES = (128, -1)
# Dimensions of the codes as cut by _PIECES, in the order in which Marlin lays them down.
#            K/16 h  t  l | N/64 j  b  c
_PIECES = ((-1, 2, 4, 2), (-1, 4, 2, 8))
_MARLIN_ORDER = (0, 4, 7, 2, 5, 3, 6, 1)


def find_obstacle(
    bits: int, in_features: int, out_features: int, group_size: int, symmetric: bool
) -> str | None:
    """Say in words why Marlin cannot hold a layer with these settings; None if it can."""
    if bits != BITS:
        return f"it has {bits} bits; Marlin holds 4"
    if not symmetric:
        return "it is asymmetric (sym=False); Marlin's zero point is always 8"
    if group_size not in (*GROUP_SIZES, in_features):
        return f"its group_size is {group_size}; Marlin's is 128 or -1"
    if in_features % 128 or out_features % 256:
        return (
            f"it maps {in_features} inputs to {out_features} outputs; "
            "Marlin needs multiples of 128 and 256"
        )
    return None


def to_marlin_weight(
    qweight: Tensor,  # [K / 8, N]
) -> Tensor:  # [K / 16, 2 N]
    """Reorder packed codes; every bit is kept."""
    (rows, columns), codes = _PIECES, unpack(qweight, BITS)
    pieces = codes.unflatten(1, columns).unflatten(0, rows).permute(_MARLIN_ORDER)
    words = pack(pieces.flatten(1).t(), BITS)
    return words.t().contiguous()


def from_marlin_weight(
    b: Tensor,  # [K / 16, 2 N]
) -> Tensor:  # [K / 8, N]
    """Undo :func:`to_marlin_weight`."""
    codes = unpack(b.t(), BITS).t()  # [K / 16, 16 N]
    pieces = codes.unflatten(1, (-1, 8, 4, 4, 2, 2, 2))
    back = sorted(range(len(_MARLIN_ORDER)), key=_MARLIN_ORDER.__getitem__)
    return pack(pieces.permute(back).flatten(4).flatten(0, 3), BITS)


def swap_scales(
    scales: Tensor,  # [G, N]
) -> Tensor:  # [G, N]
    """Put scales in Marlin's order, or Marlin's scales back: it is its own inverse.

    A thread reads the scales of its columns at once.  One scale a column (G = 1) is applied to the
    accumulators at the end, which threads hold in another order than weights; hence two ways.
    """
    runs = (8, 8) if scales.shape[0] > 1 else (4, 4, 2)
    swapped: Tensor = scales.unflatten(1, (-1, *runs)).transpose(2, 3)
    return swapped.flatten(1).contiguous()
