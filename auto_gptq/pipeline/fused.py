"""A block's norms and rotations in one kernel each, while a model is quantized in 16 bits.

transformers writes a norm as seven operations on all hidden states and a rotation as ten, which
together take about half as long as the products of a forward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.capture import forwards_replaced
from ..kernels import decode_ops, native

_ROWS = 8  # of the trials
# How transformers calls it, and begins its arguments, in the file of every model that rotates.
_ROTATION = "apply_rotary_pos_emb"
_ARGUMENTS = ["q", "k", "cos", "sin"]


@contextmanager
def fused(block: nn.Module) -> Iterator[None]:
    """Let norms and rotations that are known run in one kernel each.

    Which ones are is found by trial, so the block's weights have to be on its device.  Results
    differ in where they round to 16 bits.  Where weights have 32 bits, as on a CPU, nothing is
    changed.
    """
    with fused_norms(block), fused_rotations(block), without_cudnn_attention():
        yield


@contextmanager
def fused_norms(block: nn.Module) -> Iterator[None]:
    """Let those norms of a block run as ``torch.nn.functional.rms_norm`` that are the same."""
    norms = [module for module in block.modules() if _is_rms_norm(module)]

    def fused(index: int, own: Any) -> Any:
        return lambda x: (
            _rms_norm(norms[index], x) if x.dtype == _weight(norms[index]).dtype else own(x)
        )

    with forwards_replaced(norms, fused):
        yield


def _is_rms_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.dtype.itemsize != 2:
        return False
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not alone or "forward" in module.__dict__ or _epsilon(module) is None:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # of a gated one, say
        return False
    x = torch.linspace(-2, 3, _ROWS * len(weight), dtype=weight.dtype, device=weight.device)
    x = x.view(_ROWS, -1)
    found, wanted = _rms_norm(module, x), module(x)
    same = found.dtype == wanted.dtype and found.shape == wanted.shape
    return same and torch.allclose(found, wanted, rtol=2 * torch.finfo(x.dtype).eps)


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    weight = _weight(norm)
    return F.rms_norm(x, weight.shape, weight, _epsilon(norm))


def _weight(norm: nn.Module) -> Tensor:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight


def _epsilon(norm: nn.Module) -> float | None:
    epsilon: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon


@contextmanager
def fused_rotations(block: nn.Module) -> Iterator[None]:
    """Let queries and keys be rotated by an operator, in the files that the block's classes are of.

    What calls for another rotation, or for gradients, gets the file's own function.
    """
    native.load()
    weight = next(block.parameters())
    files = {type(module).__module__ for module in block.modules()}
    replaced: list[tuple[ModuleType, Any]] = []
    try:
        for file in (sys.modules[name] for name in files if name.startswith("transformers.")):
            own = getattr(file, _ROTATION, None)
            if own is not None and weight.dtype.itemsize == 2 and _is_known(own, weight):
                replaced.append((file, own))
                setattr(file, _ROTATION, _in_one_kernel(own))
        yield
    finally:
        for file, own in replaced:
            setattr(file, _ROTATION, own)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let torch choose another attention than cuDNN's, which every thread plans anew.

    On an H100 that takes 70 ms a thread; eight threads wait longer than the 32 blocks of a 7B model
    gain by it, which is 8 ms each.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _is_known(rotation: Any, like: Tensor) -> bool:
    """Tell by trial whether a function is two times the operator ``rotate``."""
    arguments = list(inspect.signature(rotation).parameters.values())
    others = arguments[len(_ARGUMENTS) :]
    if [argument.name for argument in arguments[: len(_ARGUMENTS)]] != _ARGUMENTS or any(
        argument.default is inspect.Parameter.empty for argument in others
    ):
        return False
    numbers = torch.linspace(-2, 3, 4 * _ROWS * 32, dtype=like.dtype, device=like.device)
    q, k, cosine, sine = numbers.view(4, 1, 1, _ROWS, 32)
    given = q, k, cosine[0], sine[0]
    tolerance = 4 * torch.finfo(like.dtype).eps
    return all(
        found.shape == wanted.shape and torch.allclose(found, wanted, tolerance, 4 * tolerance)
        for found, wanted in zip(_rotated(*given), rotation(*given), strict=True)
    )


def _in_one_kernel(own: Any) -> Any:
    def rotation(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        fits = not torch.is_grad_enabled() and cos.shape == sin.shape
        if others or named or not fits or not _fits(q, cos) or not _fits(k, cos):
            result: tuple[Tensor, Tensor] = own(q, k, cos, sin, *others, **named)
            return result
        return _rotated(q, k, cos, sin)

    return rotation


def _fits(x: Tensor, angles: Tensor) -> bool:
    """Tell whether the operator takes heads ``[B, Q, T, D]`` and these angles."""
    if x.dim() != 4 or angles.dim() != 3 or x.dtype != angles.dtype or x.dtype.itemsize != 2:
        return False
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    return (
        aligned
        and x.stride(3) == 1
        and x.shape[3] % 16 == 0
        and angles.is_contiguous()
        and angles.shape[0] in (1, x.shape[0])
        and angles.shape[1:] == x.shape[2:]
    )


def _rotated(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    results = torch.empty_like(q), torch.empty_like(k)
    for x, out in zip((q, k), results, strict=True):
        torch.ops.auto_gptq.rotate(x, cosine, sine, out)
    return results


_ = decode_ops  # importing it defines the operator
