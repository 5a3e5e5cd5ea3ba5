"""Try the compiled kernels once on the device that is to run them, before anything depends on them.

A processor or driver that nobody has tried must not give wrong text without a word.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..formats.gptq import GPTQTensors, trivial_g_idx
from ..formats.tiles import order_for_cpu, to_tiles
from . import expert_ops, ops, reference

# 16-bit x and sums in another order cost a tenth of this; misplaced codes cost a hundred times it.
_TOLERANCE = 0.01
_K, _N, _GROUP = 192, 96, 64

logger = logging.getLogger(__name__)


@functools.cache
def failure(device: torch.device, bits: int) -> str | None:
    """Say what is wrong with the kernels over tiles on a device, None if nothing; log it once.

    Some milliseconds, and only at the first call for a device and a number of bits.
    """
    try:
        wrong = _first_wrong(device, bits)
    except RuntimeError as error:  # CUDA: no kernel image for this device, ...
        wrong = f"stops with {error}"
    if wrong is None:
        return None
    message = f"with {bits} bits on {_name(device)} {wrong}"
    logger.warning("A compiled kernel %s. A slower one takes its place.", message)
    return message


def _first_wrong(device: torch.device, bits: int) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        random = torch.randint(-(2**31), 2**31, shape, generator=generator)
        return random.to(torch.int32)

    groups = _K // _GROUP
    packed = GPTQTensors(
        words(_K // 32 * bits, _N),
        words(groups, _N // 32 * bits),
        (torch.rand(groups, _N, generator=generator) + 0.5).half(),
        trivial_g_idx(_K, _GROUP),
    )
    moved = GPTQTensors(*(tensor.to(device) for tensor in vars(packed).values()))
    tiled = to_tiles(moved, bits, _GROUP, 1)
    settings = bits, _GROUP, _K, _N
    weight = reference.dequantize(
        packed.qweight, packed.qzeros, packed.scales, packed.g_idx, bits, 1, torch.float32
    )
    there = list(vars(tiled).values())
    op = torch.ops.auto_gptq
    repacked = op.repack_tiles(moved.qweight, None, bits, _GROUP)
    if not torch.equal(repacked, tiled.tiles):
        return "repack_tiles misplaces codes"
    dense = op.dequantize_tiles(*there, *settings, torch.float32)
    if not torch.equal(dense.cpu(), weight):
        return "dequantize_tiles gives another weight"
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float16, torch.bfloat16)
    for dtype in dtypes:
        for rows in (1, 20, 200):
            x = torch.randn(rows, _K, generator=generator).to(dtype)
            expected = x.float() @ weight.t()
            found = op.q_matmul(x.to(device), *there, None, *settings).float().cpu()
            error = float((found - expected).norm() / expected.norm())
            if not error < _TOLERANCE:
                return f"multiplies {rows} rows of {dtype} with a relative error of {error:.2g}"
    return None


@functools.cache
def failure_of_experts(device: torch.device, bits: int) -> str | None:
    """Say what is wrong with products of experts on a device, None if nothing; log it once."""
    try:
        wrong = _first_wrong_experts(device, bits)
    except RuntimeError as error:
        wrong = f"stops with {error}"
    if wrong is None:
        return None
    message = f"with {bits} bits on {_name(device)} {wrong}"
    logger.warning("Products of experts %s. Their linears are called one by one.", message)
    return message


# Outputs, and rows of three experts: what makes each kernel, and each way to divide its work, run.
_EXPERTS = ((96, (1, 0, 2)), (96, (16, 0, 11)), (96, (70, 1, 40)), (16384, (1, 3, 2)))


def _first_wrong_experts(device: torch.device, bits: int) -> str | None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float16, torch.bfloat16)
    for outputs, sizes in _EXPERTS:
        count, rows_of_tiles, columns = len(sizes), -(-outputs // 64), _K // 64
        words = (count, rows_of_tiles, columns, 128 * bits)
        tiles = torch.randint(-(2**31), 2**31, words, generator=generator).to(torch.int32)
        tiles_here = order_for_cpu(tiles) if bits == 4 else tiles
        grids = (count, _K // _GROUP, rows_of_tiles * 64)
        scales = (torch.rand(grids, generator=generator) + 0.5).half()
        zeros = torch.randint(2**bits, grids, generator=generator).to(torch.uint8)
        ends = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        settings = bits, _GROUP, _K, outputs
        for dtype in dtypes:
            x = torch.randn(sum(sizes), _K, generator=generator).to(dtype)
            weight = (ends, tiles_here, scales, zeros)
            expected = expert_ops.q_experts(x.float(), None, *weight, None, None, *settings, False)
            own = tiles_here if device.type == "cpu" else tiles
            there = [tensor.to(device) for tensor in (ends, own, scales, zeros)]
            y = torch.ops.auto_gptq.q_experts(
                x.to(device), None, *there, None, None, *settings, False
            )
            error = float((y.float().cpu() - expected).norm() / expected.norm())
            if not error < _TOLERANCE:
                return f"multiply {sizes} rows of {dtype} with a relative error of {error:.2g}"
    return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_ = ops  # importing it defines the operators
