"""The GPTQ checkpoint tensors of one linear layer: qweight, qzeros, scales, g_idx.

K = in_features, N = out_features, G = number of groups.

======== ===================== ======= ===========================================
tensor   shape                 dtype   content
======== ===================== ======= ===========================================
qweight  [K / 32 * bits, N]    int32   codes packed along K
qzeros   [G, N / 32 * bits]    int32   zero points packed along N; v1 stores zero - 1
scales   [G, N]                float   scale of each group and output
g_idx    [K]                   int32   group of each input, in the original order
======== ===================== ======= ===========================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .packing import CODES_PER_STREAM, pack, unpack

# What is added to a stored zero point to get the real one, by checkpoint format.  The last two are
# layouts on disk only: in memory their zero points are stored as this says.
ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0, "marlin": 1, "gemm": 0}


@dataclass(frozen=True)
class GPTQTensors:
    """The packed tensors of one layer, as they lie in a checkpoint."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups; the last one may be short. ``group_size`` -1 means one group."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def trivial_g_idx(
    in_features: int, group_size: int, device: torch.device | str | None = None
) -> Tensor:
    """``g_idx`` of contiguous groups: ``[0, 0, ..., 1, 1, ...]`` int32."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features, dtype=torch.int32, device=device) // size


def pack_layer(
    codes: Tensor,  # [N, K] integers in [0, 2**bits)
    scales: Tensor,  # [N, G]
    zeros: Tensor,  # [N, G] integers in [0, 2**bits)
    g_idx: Tensor,  # [K]
    *,
    bits: int,
    checkpoint_format: str = "gptq",
    scale_dtype: torch.dtype = torch.float16,
    qweight: Tensor | None = None,
) -> GPTQTensors:
    """Pack one layer's integers into checkpoint tensors.

    :param qweight: the codes, where something faster has packed them already
    """
    stored_zeros = (zeros.to(torch.int32) - ZERO_OFFSET[checkpoint_format]) & ((1 << bits) - 1)
    return GPTQTensors(
        qweight=pack(codes.t(), bits) if qweight is None else qweight,
        qzeros=pack_zeros(stored_zeros.t(), bits),
        scales=scales.t().to(scale_dtype).contiguous(),
        # Copied: linears solved together share it, and transformers saves no shared tensors.
        g_idx=g_idx.to(torch.int32, copy=True),
    )


def unpack_codes(qweight: Tensor, bits: int) -> Tensor:
    """Give the codes ``[K, N]`` uint8 of packed weights."""
    return unpack(qweight, bits)


def unpack_zeros(qzeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Give the zero points ``[G, N]`` int32; a stored -1 of v1 reads as 0."""
    stored = unpack(qzeros.t(), bits).t().to(torch.int32)
    return (stored + zero_offset) & ((1 << bits) - 1)


def convert_zeros(
    qzeros: Tensor,  # [G, N / 32 * bits]
    bits: int,
    *,
    source: str,
    target: str,
    name: str = "The layer",
) -> Tensor:  # [G, N / 32 * bits]
    """Rewrite zero points for another format.

    :param name: what to call the layer in the message
    :raises CheckpointError: if the target is v1 and a zero point is 0, which v1 cannot say: it
        stores -1 as the largest code, and its readers take that for 0 or for ``2**bits``
    """
    added, subtracted = ZERO_OFFSET[source], ZERO_OFFSET[target]
    if added == subtracted:
        return qzeros
    zeros = unpack_zeros(qzeros, bits, added)
    if subtracted and (zeros == 0).any():
        raise CheckpointError(
            f"{name} has {int((zeros == 0).sum())} zero points of 0, which the format {target!r} "
            "cannot hold. Save with checkpoint_format='gptq_v2'."
        )
    return pack_zeros((zeros - subtracted) & ((1 << bits) - 1), bits)


def middle_zeros(groups: int, out_features: int, bits: int, checkpoint_format: str) -> Tensor:
    """Give the ``qzeros`` of a symmetric layer: every zero point is ``2**(bits - 1)``."""
    stored = (1 << (bits - 1)) - ZERO_OFFSET[checkpoint_format]
    word = pack(torch.full((CODES_PER_STREAM, 1), stored), bits).flatten()
    return word.repeat(groups, out_features // CODES_PER_STREAM)


def has_middle_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> bool:
    """Tell whether every zero point is the middle code, as in a symmetric layer."""
    zeros = unpack_zeros(qzeros, bits, ZERO_OFFSET[checkpoint_format])
    return bool((zeros == 1 << (bits - 1)).all())


def has_zero_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> bool:
    """Tell whether some zero point is 0, which v1 cannot hold."""
    return bool((unpack_zeros(qzeros, bits, ZERO_OFFSET[checkpoint_format]) == 0).any())


def pack_zeros(stored: Tensor, bits: int) -> Tensor:  # [G, N / 32 * bits] int32
    """Pack what is stored of zero points, ``[G, N]``."""
    return pack(stored.t(), bits).t().contiguous()
