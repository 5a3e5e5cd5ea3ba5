"""The GPTQ solver as pure functions on tensors (Frantar et al. 2022, arXiv 2210.17323).

Weights are ``[N, K]`` (row = output); columns are processed one after another, and the rounding
error of each is made up for by the columns still to come.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericsError
from ..formats.gptq import trivial_g_idx
from ..formats.grid import Grid, GridRule
from ..kernels import gpu, ops, reference
from .hessian import Factor, factorize
from .precision import tensor_cores

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
    correction: float = 0.0  # share of the pull that is followed


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
    pull: Tensor | None = None,  # [N, K] fp32, see Hessian.pull
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
    columns = weight.shape[1]
    target = weight.to(torch.float32)
    if not torch.isfinite(target).all():
        raise NumericsError("The weight holds NaN or infinity; the checkpoint is damaged.")
    order = _processing_order(hessian, options.act_order)
    factor = factorize(hessian[order][:, order], options.damp_percent)
    if pull is not None and options.correction:
        if not torch.isfinite(pull).all():
            raise NumericsError(
                "The full-precision model's activations hold NaN or infinity. If it runs in "
                "float16, load it with torch_dtype=torch.bfloat16 or torch.float32."
            )
        target = target + options.correction * _shift(pull, order, factor.inverse)

    # A product's last bits depend on its shape, but for the kernel that takes each row by itself.
    alone = gpu.takes_matrices(target, _fitted_on_the_way(options, columns))
    parted = part_rows(len(weight), 1 if alone else parts)
    return joined([_solve_rows(target[rows], order, factor, options) for rows in parted])


def joined(solutions: list[Solution]) -> Solution:
    """Stack the solutions of one matrix's rows."""
    first = solutions[0]
    if len(solutions) == 1:
        return first
    unrounded = [solution.unrounded for solution in solutions if solution.unrounded is not None]
    return replace(
        first,
        codes=torch.cat([solution.codes for solution in solutions]),
        scales=torch.cat([solution.scales for solution in solutions]),
        zeros=torch.cat([solution.zeros for solution in solutions]),
        loss=torch.cat([solution.loss for solution in solutions]),
        unrounded=torch.cat(unrounded) if unrounded else None,
    )


def _solve_rows(
    target: Tensor,  # [N, K]
    order: Tensor,  # [K]
    factor: Factor,
    options: SolverOptions,
) -> Solution:
    rule, columns = options.rule, target.shape[1]
    size = _fitted_on_the_way(options, columns)
    back = torch.argsort(order)
    group = trivial_g_idx(columns, options.group_size, target.device)
    # 1 / U_ii² is the variance of input i given all inputs processed after it: the share of its
    # rounding error that nothing can make up for.
    importance = factor.inverse.diagonal().square().reciprocal() if options.scale_search else None
    weight = target.t()[order].contiguous()  # held transposed, so that a column is contiguous
    if not size:
        grid = _fit_groups(
            target.t().contiguous(),
            options.group_size,
            rule,
            None if importance is None else importance[back],
        )
        scales, zeros, group_at = grid.scale, grid.zero, group[order]
    else:
        scales = weight.new_empty(-(-columns // size), weight.shape[1])
        zeros, group_at = torch.empty_like(scales), group
        group = torch.empty_like(group).index_copy_(0, order, group)

    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    importance, factors = _candidates(weight, importance, rule)
    by_kernel = gpu.takes_matrices(target, size)
    solve_matrix = torch.ops.auto_gptq.solve_matrix if by_kernel else reference.solve_matrix
    loss = solve_matrix(
        weight,
        codes,
        errors,
        factor.inverse,
        scales,
        zeros,
        group_at.to(torch.long),
        importance,
        factors,
        size,
        rule.bits,
        rule.symmetric,
        rule.lowest_zero,
        rule.scale_dtype,
    )
    unrounded = None
    if options.keep_unrounded:
        wanted = weight / scales[group_at] + zeros[group_at]
        # Where a code was cut off, the last number that is rounded to it.
        unrounded = codes + (wanted - codes).clamp(-_NEARLY_HALF, _NEARLY_HALF)
    return Solution(
        codes=codes[back].t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros.t().to(torch.int32).contiguous(),
        g_idx=group,
        loss=loss,
        damp_percent=factor.damp_percent,
        unrounded=None if unrounded is None else unrounded[back].t().contiguous(),
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
    pull: Tensor,  # [N, K]
    order: Tensor,  # [K]
    inverse: Tensor,  # [K, K] the factor U in processing order
) -> Tensor:  # [N, K]
    """Give the change of the weight that meets a pull.

    With ``D = wanted - W X``, ``‖W X + D - Q X‖²`` is ``(W* - Q) H (W* - Q)ᵀ`` plus what does not
    depend on Q, where ``W* = W + (D Xᵀ) H⁻¹``.  Here ``(H + damping)⁻¹ = Uᵀ U``.
    """
    shift = torch.empty_like(pull)
    shift[:, order] = pull[:, order] @ inverse.t() @ inverse
    return shift


def _fitted_on_the_way(options: SolverOptions, columns: int) -> int:
    """Give the size of groups whose grids wait for the updated weights; 0 if none does."""
    fixed = options.static_groups or options.group_size in (-1, columns)
    return 0 if fixed else options.group_size


def _fit_groups(
    weight: Tensor,  # [K, N], held transposed
    group_size: int,
    rule: GridRule,
    importance: Tensor | None = None,  # [K]; None for min-max grids
) -> Grid:  # scale, zero: [G, N]
    """Fit every contiguous group; the last one may be short."""
    scale, zero = torch.ops.auto_gptq.fit_grids(
        weight,
        *_candidates(weight, importance, rule),
        len(weight) if group_size == -1 else group_size,
        rule.bits,
        rule.symmetric,
        rule.lowest_zero,
        rule.scale_dtype,
    )
    return Grid(scale, zero, rule.maxq)


def _candidates(
    weight: Tensor,  # [K, N]
    importance: Tensor | None,  # [K]
    rule: GridRule,
) -> tuple[Tensor, Tensor]:
    """Give the columns' importance and the ranges to try, without waiting for the device."""
    if importance is None:
        return weight.new_ones(len(weight)), weight.new_ones(1)
    return importance, _factors(rule.factors, weight.device)


@functools.lru_cache(maxsize=32)
def _factors(factors: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(factors, device=device)


def part_rows(rows: int, parts: int) -> list[slice]:
    """Part the rows of a matrix into equal parts, or into one if they are few."""
    share = -(-rows // parts // _ROWS_TOGETHER) * _ROWS_TOGETHER
    if share * (parts - 1) >= rows:  # the last would have none
        return [slice(0, rows)]
    return [slice(start, min(start + share, rows)) for start in range(0, rows, share)]


_ = ops  # importing it defines the operators
