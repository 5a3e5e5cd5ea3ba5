"""Plain torch implementation of every operator: correct on every device, fast on none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.gptq import trivial_g_idx, unpack_codes, unpack_zeros
from ..formats.grid import Grid, GridRule
from ..formats.packing import pack
from ..formats.tiles import (
    pad,
    place_order,
    read_codes,
    run_length,
    tile_codes,
    untile_codes,
)


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


def repack_tiles(
    qweight: Tensor,  # [K / 32 * bits, N] int32
    perm: Tensor | None,  # [K] int32
    bits: int,
    group_size: int,
) -> Tensor:  # [N' / 64, K' / 64, 128 * bits] int32
    """Lay packed codes out in tiles."""
    return tile_codes(qweight, perm, bits, group_size)


def unrepack_tiles(
    tiles: Tensor,  # [N' / 64, K' / 64, 128 * bits] int32
    perm: Tensor | None,  # [K] int32
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:  # [K / 32 * bits, N] int32
    """Undo :func:`repack_tiles`."""
    return untile_codes(tiles, perm, bits, group_size, (in_features, out_features))


def dequantize_tiles(
    tiles: Tensor,  # [N' / 64, K' / 64, 128 * bits] int32
    scales: Tensor,  # [G, N']
    zeros: Tensor | None,  # [G, N'] uint8; None if each is 2**(bits - 1)
    perm: Tensor | None,  # [K] int32: the input at each place of the tiles
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """Give the dense weight, computed in fp32 and rounded once; sorted by group without perm."""
    codes = read_codes(tiles, bits, group_size, (in_features, out_features))
    group = trivial_g_idx(in_features, group_size, tiles.device).long()
    scale = scales[:, :out_features].to(torch.float32)[group]
    zero = 1 << (bits - 1) if zeros is None else zeros[:, :out_features].to(torch.float32)[group]
    weight = ((codes.to(torch.float32) - zero) * scale).to(dtype)
    if perm is not None:
        weight = torch.empty_like(weight).index_copy_(0, perm.long(), weight)
    return weight.t().contiguous()


def q_matmul(
    x: Tensor,  # [..., K]
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,  # [N]
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:  # [..., N] in the dtype of x
    """Multiply by the dequantized weight."""
    settings = bits, group_size, in_features, out_features
    weight = dequantize_tiles(tiles, scales, zeros, perm, *settings, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def q_matmul_int8(
    x: Tensor,  # [..., K]
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,  # [N]
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:  # [..., N] in the dtype of x
    """Multiply ``x``, with 32 inputs at a time rounded to 8 bits, by the dequantized weight."""
    settings = bits, group_size, in_features, out_features
    rounded = round_inputs(x.to(torch.float32), perm, group_size)
    return q_matmul(rounded, tiles, scales, zeros, perm, bias, *settings).to(x.dtype)


def round_inputs(
    x: Tensor,  # [..., K] fp32
    perm: Tensor | None,  # [K] int32
    group_size: int,
) -> Tensor:  # [..., K] fp32
    """Round to whole numbers of -127 to 127 times a scale, which 32 inputs of a tile share."""
    in_features = x.shape[-1]
    place = torch.arange(in_features, device=x.device) if perm is None else perm.long()
    order = place_order(run_length(group_size, in_features), in_features).to(x.device)
    padded = pad(x.flatten(0, -2)[:, place], 1)
    blocks = padded[:, order].unflatten(1, (-1, 32))
    largest = blocks.abs().amax(2, keepdim=True)
    inverse = torch.where(largest > 1e-30, 127 / largest, 0)
    rounded = torch.empty_like(padded)
    rounded[:, order] = ((blocks * inverse).round() * (largest / 127)).flatten(1)
    return (
        torch.empty_like(x)
        .flatten(0, -2)
        .index_copy_(1, place, rounded[:, :in_features])
        .view(x.shape)
    )


def q_linear_experts(
    x: Tensor,  # [S, K], rows sorted by expert
    offsets: Tensor,  # [E] int, where each expert's rows end
    qweight: list[Tensor],  # per expert, as in `q_linear`
    qzeros: list[Tensor],
    scales: list[Tensor],
    g_idx: list[Tensor],
    bits: int,
    zero_offset: int,
) -> Tensor:  # [S, N]
    """Multiply each expert's rows by its own weight; rows behind the last expert's give 0."""
    output = x.new_zeros(x.shape[0], qweight[0].shape[1])
    start = 0
    for e, stop in enumerate(offsets.tolist()):
        if stop > start:
            packed = (qweight[e], qzeros[e], scales[e], g_idx[e])
            output[start:stop] = torch.ops.auto_gptq.q_linear(
                x[start:stop], *packed, None, bits, zero_offset
            )
        start = stop
    return output


def solve_columns(
    weight: Tensor,  # [B, N] fp32, a block of columns held transposed; updated in place
    codes: Tensor,  # out [B, N] uint8
    errors: Tensor,  # out [B, N] fp32: rounding errors, divided by the factor's diagonal
    inverse: Tensor,  # [B, B] fp32, upper triangular factor of the inverse Hessian
    scales: Tensor,  # [G, N] fp32
    zeros: Tensor,  # [G, N] fp32, whole numbers
    group: Tensor,  # [B] int64, the group of each column
    maxq: int,
) -> None:
    """Quantize columns one after another, taking each one's error out of the later ones.

    (GPTQ, section 4, algorithm 1, the inner loop.)
    """
    column_scales, column_zeros = scales[group], zeros[group]
    diagonal = inverse.diagonal()
    for i in range(weight.shape[0]):
        grid = Grid(column_scales[i], column_zeros[i], maxq)
        kept = grid.to_codes(weight[i])
        torch.div(weight[i] - grid.from_codes(kept), diagonal[i], out=errors[i])
        weight[i + 1 :].addr_(inverse[i, i + 1 :], errors[i], alpha=-1)
        codes[i] = kept


def fit_grids(
    weight: Tensor,  # [n, N] fp32, columns held transposed
    importance: Tensor,  # [n] fp32, weight of each column's squared error
    factors: Tensor,  # [F] fp32, ranges to try as shares of the min-max one; < 0: negative scales
    group_size: int,
    bits: int,
    symmetric: bool,
    lowest_zero: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # scales, zeros: [G, N] fp32; the last group may be short
    """Give every group of columns, for each output, the grid of the least weighted squared error.

    Of equal errors the first factor's grid is taken.
    """
    rule = GridRule(bits, symmetric, scale_dtype, lowest_zero)
    grids = []
    for start in range(0, weight.shape[0], group_size):
        part = slice(start, start + group_size)
        group = weight[part]
        lowest, highest = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
        tried = [rule.part(lowest, highest, factor) for factor in factors]
        missed = [group - grid.from_codes(grid.to_codes(group)) for grid in tried]
        best = torch.stack([importance[part] @ x.square() for x in missed]).argmin(0, keepdim=True)
        grids.append([torch.stack(x).gather(0, best)[0] for x in _fields(tried)])
    scales, zeros = ([*x] for x in zip(*grids, strict=True))
    return torch.stack(scales), torch.stack(zeros)


# Columns treated one by one before their common error goes to the others in one matrix product.
# Groups are fitted for about as many columns together (the block size of the paper).
_COLUMNS = 128


def solve_matrix(
    weight: Tensor,  # [K, N] fp32, held transposed; updated in place
    codes: Tensor,  # out [K, N] uint8
    errors: Tensor,  # out [K, N] fp32, as in solve_columns
    inverse: Tensor,  # [K, K] fp32
    scales: Tensor,  # [G, N] fp32; out if group_size is not 0
    zeros: Tensor,  # [G, N] fp32; out if group_size is not 0
    group: Tensor,  # [K] int64
    importance: Tensor,  # [K] fp32, as in fit_grids
    factors: Tensor,  # [F] fp32, as in fit_grids
    group_size: int,  # 0: the grids are given; else they are fitted on the way
    bits: int,
    symmetric: bool,
    lowest_zero: int,
    scale_dtype: torch.dtype,
) -> Tensor:  # [N] fp32: the sum of each output's squared errors
    """Quantize all columns, by the two steps above.

    Grids are fitted to what the errors before have made of the weights, a batch of groups of about
    128 columns together.  Fitting each group anew inside the batch sounds better and is not: with
    2 bits the made-up weights are large, and a min-max grid over them costs up to 1.8 times the
    error.
    """
    columns = weight.shape[0]
    batch = max(1, _COLUMNS // group_size) * group_size if group_size else _COLUMNS

    def make_up(ahead: slice, start: int) -> None:
        if ahead.start > start:
            done = slice(start, ahead.start)
            weight[ahead].addmm_(inverse[done, ahead].t(), errors[done], alpha=-1)

    for start in range(0, columns, batch):
        stop = min(start + batch, columns)
        ahead = slice(start, stop)
        make_up(ahead, 0)
        if group_size:
            fitted = slice(start // group_size, -(-stop // group_size))
            scales[fitted], zeros[fitted] = torch.ops.auto_gptq.fit_grids(
                weight[ahead],
                importance[ahead],
                factors,
                group_size,
                bits,
                symmetric,
                lowest_zero,
                scale_dtype,
            )
        for first in range(start, stop, _COLUMNS):
            part = slice(first, min(first + _COLUMNS, stop))
            make_up(part, start)
            torch.ops.auto_gptq.solve_columns(
                weight[part],
                codes[part],
                errors[part],
                inverse[part, part],
                scales,
                zeros,
                group[part],
                (1 << bits) - 1,
            )
    return errors.square().sum(0)


def _fields(grids: list[Grid]) -> tuple[list[Tensor], list[Tensor]]:
    return [grid.scale for grid in grids], [grid.zero for grid in grids]


def pack_codes(
    codes: Tensor,  # [N, K] uint8
    bits: int,
) -> Tensor:  # [K / 32 * bits, N] int32
    """Pack the solver's integers."""
    return pack(codes.t(), bits)


def dequantize_codes(
    codes: Tensor,  # [N, K] uint8
    scales: Tensor,  # [N, G] fp32
    zeros: Tensor,  # [N, G] int32
    g_idx: Tensor,  # [K] int32
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """Give the weights that the solver's integers stand for, rounded once."""
    return ((codes - zeros[:, g_idx]) * scales[:, g_idx]).to(dtype)
