"""The GPTQ solver as pure functions on tensors (Frantar et al. 2022, arXiv 2210.17323).

Weights are ``[N, K]`` (row = output); columns are processed one after another, and the rounding
error of each is made up for by the columns still to come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NumericsError
from ..formats.gptq import trivial_g_idx
from ..formats.grid import Grid, GridRule
from ..kernels import gpu, ops, reference
from .factor import Factor, factorize
from .hessian import SAMPLED, Pull
from .precision import tensor_cores

# Columns that a GPU's kernel takes at a time.
_BY_KERNEL = 1024
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
    energy: Tensor  # [N] fp32: what the loss would be with all weights 0, without damping
    damp_percent: float  # the damping that was used
    unrounded: Tensor | None = None  # [N, K] fp32: codes before rounding, if they were asked for

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the weight ``[N, K]`` that the integers stand for."""
        weight: Tensor = torch.ops.auto_gptq.dequantize_codes(
            self.codes, self.scales, self.zeros, self.g_idx, dtype
        )
        return weight

    def by_row(self) -> dict[str, Any]:
        """Give the tensors that have a row per output."""
        names = ("codes", "scales", "zeros", "loss", "energy", "unrounded")
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def rows(self, start: int, stop: int) -> Solution:
        """Give the solution of some outputs of a stacked layer."""
        return replace(self, **{name: x[start:stop] for name, x in self.by_row().items()})


@tensor_cores()
def solve(
    weight: Tensor,  # [N, K] any float dtype
    hessian: Tensor,  # [K, K] fp32
    options: SolverOptions,
    pull: Callable[[], Pull] | None = None,
    parts: int = 1,
) -> Solution:
    """Quantize one layer.

    With a pull the target is not the weight itself but what brings the outputs nearer to what is
    wanted of them; ``loss`` then is the distance from that.

    :param pull: called once the Hessian is factored: on a GPU it may still be summed up till then
    :param parts: parts of the rows whose products are taken apart, so that as many processes, each
        with one part, get the same codes: a product's last bits depend on its shape
    :raises NumericsError: if the weight or the Hessian holds NaN or infinity
    """
    gpu.load_solver()
    columns = weight.shape[1]
    target = weight.to(torch.float32)
    if not is_finite(target):
        raise NumericsError("The weight holds NaN or infinity; the checkpoint is damaged.")
    order = _processing_order(hessian, options.act_order)
    ordered = hessian
    if options.act_order:
        ordered = hessian.index_select(0, order).index_select(1, order)
    factor = factorize(ordered, options.damp_percent)
    if pull is not None and options.correction:
        pulled = pull()
        if not is_finite(pulled.whole):
            raise NumericsError(
                "The full-precision model's activations hold NaN or infinity. If it runs in "
                "float16, load it with torch_dtype=torch.bfloat16 or torch.float32."
            )
        every = slice(0, len(weight))
        shift = by_parts(lambda rows: _shift(pulled.rows(rows), order, factor), every, parts)
        target = target + options.correction * shift

    # The kernel takes each row by itself; elsewhere all is a product.
    by_kernel = gpu.takes_matrices(target, _fitted_on_the_way(options, columns))
    cuts = [slice(0, len(target))] if by_kernel else part_rows(len(target), parts)
    found = [_solve_rows(target[rows], order, factor, options, parts) for rows in cuts]
    return replace(_joined(found), energy=_energy(weight, hessian))


def _joined(solutions: Sequence[Solution]) -> Solution:
    """Stack the solutions of one matrix's rows."""
    if len(solutions) == 1:
        return solutions[0]
    tensors = [solution.by_row() for solution in solutions]
    stacked: dict[str, Any] = {name: torch.cat([x[name] for x in tensors]) for name in tensors[0]}
    return replace(solutions[0], **stacked)


def by_parts(
    product: Callable[[slice], Tensor],
    rows: slice,
    parts: int,
) -> Tensor:
    """Take a product for parts of its rows: its last bits depend on their number."""
    cuts = part_rows(rows.stop - rows.start, parts)
    return torch.cat([product(slice(rows.start + c.start, rows.start + c.stop)) for c in cuts])


def _solve_rows(
    target: Tensor,  # [N, K]
    order: Tensor,  # [K]
    factor: Factor,
    options: SolverOptions,
    parts: int,
) -> Solution:
    rule, columns = options.rule, target.shape[1]
    size = _fitted_on_the_way(options, columns)
    back = torch.argsort(order)
    group = trivial_g_idx(columns, options.group_size, target.device)
    # 1 / U_ii² is the variance of input i given all inputs processed after it: the share of its
    # rounding error that nothing can make up for.
    importance = factor.inverse.diagonal().square().reciprocal() if options.scale_search else None
    held = target.t().contiguous()  # a column is contiguous
    weight = held.index_select(0, order) if options.act_order else held
    if not size:
        unordered = None if importance is None else importance[back]
        grid = _fit_groups(held, options.group_size, rule, unordered)
        scales, zeros, group_at = grid.scale, grid.zero, group[order]
    else:
        scales = weight.new_empty(-(-columns // size), weight.shape[1])
        zeros, group_at = torch.empty_like(scales), group
        group = torch.empty_like(group).index_copy_(0, order, group)

    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    importance, factors = _candidates(weight, importance, rule)
    group_at = group_at.to(torch.long)
    loss = weight.new_zeros(len(target))
    by_kernel = gpu.takes_matrices(target, size)
    solve_matrix = torch.ops.auto_gptq.solve_matrix if by_kernel else reference.solve_matrix
    step = _BY_KERNEL if by_kernel else columns
    for start in range(0, columns, step):
        ahead = slice(start, min(start + step, columns))
        for rows in part_rows(len(target), parts) if start else []:
            share = factor.inverse[:start, ahead].t()
            weight[ahead, rows].addmm_(share, errors[:start, rows], alpha=-1)
        loss += solve_matrix(
            weight[ahead],
            codes[ahead],
            errors[ahead],
            factor.inverse[ahead, ahead],
            scales,
            zeros,
            group_at[ahead],
            importance[ahead],
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
        codes=codes.index_select(0, back).t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros.t().to(torch.int32).contiguous(),
        g_idx=group,
        loss=loss,
        energy=loss,  # is put right by solve()
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
        _energy(target, hessian),
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


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity; reads it once, and writes nothing."""
    # A sum is finite if all terms are; one that overflows decides nothing.
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _energy(
    weight: Tensor,  # [N, K]
    hessian: Tensor,  # [K, K] fp32
) -> Tensor:  # [N] fp32
    """Give the diagonal of ``W H Wᵀ``; on a GPU to three digits, for a third of the time."""
    dtype = torch.bfloat16 if weight.is_cuda else torch.float32
    product = weight.to(dtype) @ hessian.to(dtype)
    return (product * weight).sum(1, dtype=torch.float32)


def _processing_order(hessian: Tensor, act_order: bool) -> Tensor:
    """Column indices ``[K]`` in the order of processing; act-order takes large inputs first."""
    if act_order:
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def _shift(
    pull: Pull,
    order: Tensor,  # [K]
    factor: Factor,  # in processing order
) -> Tensor:  # [N, K]
    """Give the change of the weight that meets a pull, as far as that is certain.

    With ``D = wanted - W X``, ``‖W X + D - Q X‖²`` is ``(W* - Q) H (W* - Q)ᵀ`` plus what does not
    depend on Q, where ``W* = W + (D Xᵀ) H⁻¹``.  Here ``(H + damping)⁻¹ = Uᵀ U``.
    """
    white = factor.whiten(pull.whole[:, order])
    share = _certain(white[::SAMPLED], factor.whiten(pull.doubt[:, order]))
    white *= share.repeat_interleave(_ROWS_TOGETHER)[: len(white), None]
    return factor.unwhiten(white)[:, torch.argsort(order)]


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
