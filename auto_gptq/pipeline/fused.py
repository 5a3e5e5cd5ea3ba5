"""A block's norms in one kernel each, while a model is quantized in 16 bits.

transformers writes a norm as seven operations on all hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.capture import forwards_replaced

_ROWS = 8  # of the trials


@contextmanager
def fused(block: nn.Module) -> Iterator[None]:
    """Let norms that are known run in one kernel each, and attention without cuDNN's plans.

    Which norms are is found by trial, so the block's weights have to be on its device.  Results
    differ in where they round to 16 bits.  Where weights have 32 bits, as on a CPU, no norm is
    changed.
    """
    with fused_norms(block), without_cudnn_attention():
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
