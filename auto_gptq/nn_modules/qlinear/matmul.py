"""The functions of AutoGPTQ's Triton files, over the operators of this package.

K = in_features, N = out_features, G = number of groups; tensors are those of the v1 format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import native, ops


def dequant248(
    qweight: Tensor,  # [K / 32 * bits, N]
    scales: Tensor,  # [G, N]
    qzeros: Tensor,  # [G, N / 32 * bits]
    g_idx: Tensor,  # [K]
    bits: int,
    maxq: int | None = None,
) -> Tensor:
    """Give the dense weight ``[K, N]`` in the dtype of the scales."""
    native.load()
    weight: Tensor = torch.ops.auto_gptq.dequantize(
        qweight, qzeros, scales, g_idx, bits, 1, scales.dtype
    )
    return weight.t()


def quant_matmul_248(
    input: Tensor,  # [..., K]; [..., N] if transposed
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    g_idx: Tensor,
    bits: int,
    maxq: int | None = None,
    transpose: bool = False,
) -> Tensor:  # [..., N]; [..., K] if transposed
    """Multiply with a packed weight, or with its transpose; differentiable in the input."""
    if transpose:
        weight = dequant248(qweight, scales, qzeros, g_idx, bits)
        return input @ weight.t().to(input.dtype)
    native.load()
    output: Tensor = torch.ops.auto_gptq.q_linear(
        input, qweight, qzeros, scales, g_idx, None, bits, 1
    )
    return output


def transpose_quant_matmul_248(
    input: Tensor,  # [..., N]
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    g_idx: Tensor,
    bits: int,
    maxq: int | None = None,
) -> Tensor:  # [..., K]
    """Multiply with the transpose of a packed weight."""
    return quant_matmul_248(input, qweight, scales, qzeros, g_idx, bits, maxq, transpose=True)


quant_matmul_inference_only_248 = quant_matmul_248


class QuantLinearFunction:
    """Called by its ``apply``, as the autograd function of that name was."""

    apply = staticmethod(quant_matmul_248)


QuantLinearInferenceOnlyFunction = QuantLinearFunction

_ = ops  # importing it defines the operators
