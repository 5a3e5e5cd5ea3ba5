"""The kernel that Ampere, Ada and Blackwell take for some dozen rows; it runs on Hopper as well."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from auto_gptq.formats.tiles import TileTensors, run_length
from auto_gptq.kernels import native
from tests.kernels.test_cpu_tiles import Tiled
from tests.kernels.test_q_matmul import Settings, assert_as_good_as_plain, exact_weight
from tests.kernels.test_tile_ops import BITS, operands, random_weight

TYPES = {torch.float16: 1, torch.bfloat16: 2}


class Product(ctypes.Structure):
    """The struct ``auto_gptq::Product`` of csrc/launch.h."""

    _fields_ = (
        ("weight", Tiled),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y", "workspace")),
        ("m", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def multiply(x: Tensor, tiled: TileTensors, settings: Settings, bias: Tensor | None) -> Tensor:
    """Call the kernel without torch: on Hopper the operator takes another one."""
    bits, group_size, k, n = settings
    library = ctypes.CDLL(str(native._LIBRARY))
    library.auto_gptq_cuda_q_mma_bytes.restype = ctypes.c_int64
    library.auto_gptq_cuda_q_mma.restype = ctypes.c_char_p
    pointers = [None if t is None else t.data_ptr() for t in operands(tiled)]
    whole = -(-k // 64) * 64
    groups, size = len(tiled.scales), whole if group_size == -1 else group_size
    scale_type = TYPES[tiled.scales.dtype]
    weight = Tiled(*pointers, k, n, groups, size, bits, run_length(group_size, k), scale_type)
    y = torch.full((len(x), n), torch.nan, dtype=x.dtype, device=x.device)
    addend = None if bias is None else bias.data_ptr()
    task = Product(weight, x.data_ptr(), addend, y.data_ptr(), None, len(x), TYPES[x.dtype])
    size = library.auto_gptq_cuda_q_mma_bytes(ctypes.byref(task))
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=x.device)
    task.workspace = workspace.data_ptr()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    failure = library.auto_gptq_cuda_q_mma(ctypes.byref(task), stream)
    assert failure is None, failure
    torch.cuda.synchronize()
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_products_of_some_dozen_rows_are_as_good_as_plain_ones(
    bits: int, group_size: int, act_order: bool, dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    for k, n in [(864, 416), (2048, 64)]:  # the second: inputs shared out to several blocks
        settings = bits, group_size, k, n
        _, tiled = random_weight(*settings, device, symmetric=n == 64, act_order=act_order)
        weight = exact_weight(tiled, settings)
        bias = torch.randn(n, device=device).to(dtype) if n == 64 else None
        for m in (1, 17, 32, 33, 64, 100):
            x = torch.randn(m, k, device=device).to(dtype)
            assert_as_good_as_plain(multiply(x, tiled, settings, bias), x, weight, bias)
