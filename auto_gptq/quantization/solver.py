"""The GPTQ solver as pure functions on tensors (Frantar et al. 2022, arXiv 2210.17323).

Weights are ``[N, K]`` (row = output); columns are processed one after another, and the rounding
error of each is made up for by the columns still to come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NumericsError
from ..formats.gptq import trivial_g_idx
from ..formats.grid import Grid, GridRule
from ..kernels import gpu, ops
from .hessian import SAMPLED, Pull, factorize
from .precision import tensor_cores

# Columns treated one by one before their common error goes to the others in one matrix product.
_LEAF = 128
# Columns whose groups are fitted together (the block size of the paper's implementation).
_BATCH = 128
_NEARLY_HALF = 0.499
_ROWS_TOGETHER = 64  # what the kernels take at a time


@dataclass(frozen=True)
class SolverOptions:
    """How to solve one layer."""

    rule: GridRule
    group_size: int = -1
    damp_percent: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    scale_search: bool = True  # fit ranges to the error they cause instead of min-max
    keep_unrounded: bool = False  # give the codes before rounding, too
    correction: float = 0.0  # share of what is certain in the pull that is followed


@dataclass(frozen=True)
class Solution:
    """The integers of one layer, columns in their original order."""

    codes: Tensor  # [N, K] uint8
    scales: Tensor  # [N, G] fp32, exactly representable in the rule's scale_dtype
    zeros: Tensor  # [N, G] int32
    g_idx: Tensor  # [K] int32
    loss: Tensor  # [N] fp32: each row of (W - Q) (H + damping) (W - Q)ᵀ, its diagonal element
    damp_percent: float  # the damping that was used
    unrounded: Tensor | None = None  # [N, K] fp32: codes before rounding, if they were asked for

    def dequantize(self) -> Tensor:
        """Give the fp32 weight ``[N, K]`` that the integers stand for."""
        return (self.codes - self.zeros[:, self.g_idx]) * self.scales[:, self.g_idx]

    def rows(self, start: int, stop: int) -> Solution:
        """Give the solution of some outputs of a stacked layer."""
        part = slice(start, stop)
        return Solution(
            self.codes[part],
            self.scales[part],
            self.zeros[part],
            self.g_idx,
            self.loss[part],
            self.damp_percent,
            None if self.unrounded is None else self.unrounded[part],
        )


@tensor_cores()
def solve(
    weight: Tensor,  # [N, K] any float dtype
    hessian: Tensor,  # [K, K] fp32
    options: SolverOptions,
    pull: Pull | None = None,
    parts: int = 1,
) -> Solution:
    """Quantize one layer.

    With a pull the target is not the weight itself but what brings the outputs nearer to what is
    wanted of them; ``loss`` then is the distance from that.

    :param parts: parts of the rows whose products are taken apart, so that as many processes, each
        with one part, get the same codes: a product's last bits depend on its shape
    :raises NumericsError: if the weight or the Hessian holds NaN or infinity
    """
    gpu.load_solver()
    rule = options.rule
    columns = weight.shape[1]
    target = weight.to(torch.float32)
    if not torch.isfinite(target).all():
        raise NumericsError("The weight holds NaN or infinity; the checkpoint is damaged.")
    order = _processing_order(hessian, options.act_order)
    factor = factorize(hessian[order][:, order], options.damp_percent)
    if pull is not None and options.correction:
        if not torch.isfinite(pull.whole).all():
            raise NumericsError(
                "The full-precision model's activations hold NaN or infinity. If it runs in "
                "float16, load it with torch_dtype=torch.bfloat16 or torch.float32."
            )
        target = target + options.correction * _shift(pull, order, factor.inverse)

    back = torch.argsort(order)
    group = trivial_g_idx(columns, options.group_size, weight.device)
    sweep = _Sweep(target.t()[order].contiguous(), factor.inverse, rule)
    sweep.parts = part_rows(len(weight), parts)
    if options.scale_search:
        # 1 / U_ii² is the variance of input i given all inputs processed after it: the share of its
        # rounding error that nothing can make up for.
        sweep.importance = factor.inverse.diagonal().square().reciprocal()
    if options.static_groups or options.group_size in (-1, columns):
        importance = None if sweep.importance is None else sweep.importance[back]
        sweep.take(_fit_groups(target.t().contiguous(), options.group_size, rule, importance))
        sweep.group_at = group.to(torch.long)[order]
        sweep.run(0, columns)
    else:
        sweep.group_at = group.to(torch.long)
        sweep.run_by_groups(columns, options.group_size)
        group = torch.empty_like(group).index_copy_(0, order, group)

    return Solution(
        codes=sweep.codes[back].t().contiguous(),
        scales=sweep.scales.t().contiguous(),
        zeros=sweep.zeros.t().to(torch.int32).contiguous(),
        g_idx=group,
        loss=sweep.errors.square().sum(0),
        damp_percent=factor.damp_percent,
        unrounded=sweep.unrounded()[back].t().contiguous() if options.keep_unrounded else None,
    )


def round_to_nearest(
    weight: Tensor,  # [N, K]
    hessian: Tensor,  # [K, K], only to state the loss
    options: SolverOptions,
) -> Solution:
    """Quantize without looking at activations: the baseline every solver has to beat."""
    target = weight.to(torch.float32)
    grid = _fit_groups(target.t().contiguous(), options.group_size, options.rule)
    g_idx = trivial_g_idx(weight.shape[1], options.group_size, weight.device)
    wide = Grid(grid.scale[g_idx].t(), grid.zero[g_idx].t(), options.rule.maxq)
    codes = wide.to_codes(target)
    error = target - wide.from_codes(codes)
    return Solution(
        codes.to(torch.uint8),
        grid.scale.t().contiguous(),
        grid.zero.t().to(torch.int32).contiguous(),
        g_idx,
        ((error @ hessian) * error).sum(1),
        damp_percent=0.0,
    )


def squared_error(
    weight: Tensor,  # [N, K]
    quantized: Tensor,  # [N, K]
    hessian: Tensor,  # [K, K], undamped
) -> Tensor:  # scalar fp64
    """Give ``tr((W - Q) H (W - Q)ᵀ)``, the error that GPTQ minimises (equation 1)."""
    error = (weight - quantized).to(torch.float64)
    return ((error @ hessian.to(torch.float64)) * error).sum()


def _processing_order(hessian: Tensor, act_order: bool) -> Tensor:
    """Column indices ``[K]`` in the order of processing; act-order takes large inputs first."""
    if act_order:
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def _shift(
    pull: Pull,
    order: Tensor,  # [K]
    inverse: Tensor,  # [K, K] the factor U in processing order
) -> Tensor:  # [N, K]
    """Give the change of the weight that meets a pull, as far as that is certain.

    With ``D = wanted - W X``, ``‖W X + D - Q X‖²`` is ``(W* - Q) H (W* - Q)ᵀ`` plus what does not
    depend on Q, where ``W* = W + (D Xᵀ) H⁻¹``.  Here ``(H + damping)⁻¹ = Uᵀ U``.
    """
    white = pull.whole[:, order] @ inverse.t()
    share = _certain(white[::SAMPLED], pull.doubt[:, order] @ inverse.t())
    share = share.repeat_interleave(_ROWS_TOGETHER)[: len(white), None]
    shift = torch.empty_like(white)
    shift[:, order] = (share * white) @ inverse
    return shift


def _certain(
    white: Tensor,  # [S, K] D Xᵀ Uᵀ of every so many-th output
    doubt: Tensor,  # [S, K] the same of one half of the tokens less the other
) -> Tensor:  # [ceil(S * SAMPLED / 64)]
    """Give the share of the power of ``D Xᵀ Uᵀ`` that is no chance, per 64 outputs.

    It is a sum of what holds for all tokens and of white noise, the less the more tokens.  Between
    the two halves only the noise differs, by as much as there is in both together.  A share of the
    power is the factor that is best in the mean square (Wiener's filter).
    """
    power, noise = (
        F.pad(part.square().sum(1), (0, -len(part) % (_ROWS_TOGETHER // SAMPLED)))
        .view(-1, _ROWS_TOGETHER // SAMPLED)
        .sum(1)
        for part in (white, doubt)
    )
    return 1 - (noise / torch.where(power > 0, power, 1.0)).clamp(0, 1)


def _fit_groups(
    weight: Tensor,  # [K, N], held transposed
    group_size: int,
    rule: GridRule,
    importance: Tensor | None = None,  # [K]; None for min-max grids
) -> Grid:  # scale, zero: [G, N]
    """Fit every contiguous group; the last one may be short."""
    if importance is None:
        importance, factors = weight.new_ones(len(weight)), [1.0]
    else:
        factors = list(rule.factors)
    scale, zero = torch.ops.auto_gptq.fit_grids(
        weight,
        importance,
        weight.new_tensor(factors),
        len(weight) if group_size == -1 else group_size,
        rule.bits,
        rule.symmetric,
        rule.lowest_zero,
        rule.scale_dtype,
    )
    return Grid(scale, zero, rule.maxq)


def part_rows(rows: int, parts: int) -> list[slice]:
    """Part the rows of a matrix into equal parts, or into one if they are few."""
    share = -(-rows // parts // _ROWS_TOGETHER) * _ROWS_TOGETHER
    if share * (parts - 1) >= rows:  # the last would have none
        return [slice(0, rows)]
    return [slice(start, min(start + share, rows)) for start in range(0, rows, share)]


class _Sweep:
    """One pass over the columns of a layer, held transposed so that a column is contiguous."""

    def __init__(self, weight: Tensor, inverse: Tensor, rule: GridRule) -> None:
        self.weight = weight  # [K, N] in processing order; updated in place
        self.inverse = inverse  # [K, K] upper triangular
        self.parts = [slice(None)]  # of the outputs, whose products are taken apart
        self.rule = rule
        self.importance: Tensor | None = None  # [K] for the choice of scales; None: min-max
        self.scales = weight.new_empty(0, weight.shape[1])  # [G, N] of the groups met so far
        self.zeros = weight.new_empty(0, weight.shape[1])
        self.group_at: Tensor  # [K] int64, the group of each position
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.errors = torch.empty_like(weight)  # divided by the factor's diagonal

    def unrounded(self) -> Tensor:  # [K, N] in processing order
        """Give what was rounded to codes, or the last number that is, where a code was cut off."""
        wanted = self.weight / self.scales[self.group_at] + self.zeros[self.group_at]
        return self.codes + (wanted - self.codes).clamp(-_NEARLY_HALF, _NEARLY_HALF)

    def take(self, grid: Grid) -> None:
        """Add the grids [G, N] of the next groups."""
        self.scales = torch.cat([self.scales, grid.scale])
        self.zeros = torch.cat([self.zeros, grid.zero])

    def run_by_groups(self, columns: int, group_size: int) -> None:
        """Process all columns, fitting groups to the updated weights on the way.

        A batch of groups of about 128 columns is fitted together, before its first column.
        Fitting each group anew inside the batch sounds better and is not: with 2 bits the made-up
        weights are large, and a min-max grid over them costs up to 1.8 times the error.
        """
        self.run(0, columns, max(1, _BATCH // group_size) * group_size, group_size)

    def run(self, start: int, stop: int, batch: int = 1, group_size: int = 0) -> None:
        """Process columns.

        Halving keeps almost all work in large matrix products.  Cuts fall on multiples of
        ``batch``, so that its first column finds every error made before it already made up for.
        """
        length = stop - start
        if length <= batch and group_size:
            ahead = slice(start, stop)
            importance = None if self.importance is None else self.importance[ahead]
            self.take(_fit_groups(self.weight[ahead], group_size, self.rule, importance))
            batch, group_size = 1, 0
        if length <= _LEAF and not group_size:
            self._columns(slice(start, stop))
            return
        middle = start + -(-length // (2 * batch)) * batch
        self.run(start, middle, batch, group_size)
        shares = self.inverse[start:middle, middle:stop].t()
        for rows in self.parts:
            later, errors = self.weight[middle:stop, rows], self.errors[start:middle, rows]
            later.addmm_(shares, errors, alpha=-1)
        self.run(middle, stop, batch, group_size)

    def _columns(self, part: slice) -> None:
        torch.ops.auto_gptq.solve_columns(
            self.weight[part],
            self.codes[part],
            self.errors[part],
            self.inverse[part, part],
            self.scales,
            self.zeros,
            self.group_at[part],
            self.rule.maxq,
        )


_ = ops  # importing it defines the operators
