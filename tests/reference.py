"""GPTQ written once more, as plainly as possible, in fp64: what the solver is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_gptq(
    weight: Tensor,  # [N, K]
    hessian: Tensor,  # [K, K]
    scale: Tensor,  # [N, K] the scale of each weight, fixed beforehand
    zero: Tensor,  # [N, K]
    maxq: int,
    damp_percent: float,
    order: Tensor,  # [K]
) -> Tensor:  # [N, K] codes
    """Process one column at a time with the inverse Hessian, updated by elimination each time."""
    w = weight.double()[:, order]
    h = hessian.double()[order][:, order]
    h = h + damp_percent * h.diagonal().mean() * torch.eye(
        len(h), dtype=torch.float64, device=h.device
    )
    inverse = torch.linalg.inv(h)
    codes = torch.empty_like(w)
    for k in range(w.shape[1]):
        s, z = scale[:, order[k]].double(), zero[:, order[k]].double()
        codes[:, k] = torch.clamp(torch.round(w[:, k] / s) + z, 0, maxq)
        error = w[:, k] - (codes[:, k] - z) * s
        # Optimal brain surgeon: spread the error over the columns left, then drop this column.
        w = w - torch.outer(error / inverse[k, k], inverse[k])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back


def plain_pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along dimension 0 by writing a bit string and cutting it into words."""
    n, m = codes.shape
    words = torch.zeros(n * bits // 32, m, dtype=torch.int64)
    for column in range(m):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column].tolist()))
        for word in range(len(words)):
            words[word, column] = (stream >> (32 * word)) & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def plain_awq_pack(codes: Tensor) -> Tensor:
    """Pack 4-bit codes ``[n, N]`` as AWQ does: eight columns a word, the even ones first."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for column in range(codes.shape[1]):
        place = (0, 2, 4, 6, 1, 3, 5, 7).index(column % 8)
        words[:, column // 8] |= codes[:, column].long() << 4 * place
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
