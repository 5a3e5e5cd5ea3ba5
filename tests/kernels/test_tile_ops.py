"""The operators over tiles: fakes, autograd, and every kernel against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_gptq.formats.gptq import GPTQTensors, group_count, trivial_g_idx
from auto_gptq.formats.tiles import TileTensors, to_tiles
from auto_gptq.kernels import native, ops, reference

assert ops  # importing it defines the operators

OPS = torch.ops.auto_gptq
BITS = (2, 3, 4, 8)


def random_weight(
    bits: int,
    group_size: int,
    k: int,
    n: int,
    device: torch.device,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[GPTQTensors, TileTensors]:
    native.load()
    groups = group_count(k, group_size)
    g_idx = trivial_g_idx(k, group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    qweight = torch.randint(-(2**31), 2**31, (k // 32 * bits, n)).to(torch.int32)
    qzeros = torch.randint(-(2**31), 2**31, (groups, n // 32 * bits)).to(torch.int32)
    scales = (torch.randn(groups, n) * 0.02).to(dtype)
    packed = GPTQTensors(*(t.to(device) for t in (qweight, qzeros, scales, g_idx)))
    tiled = to_tiles(packed, bits, group_size, 1)
    if symmetric:
        tiled = TileTensors(tiled.tiles, tiled.scales, None, tiled.perm)
    return packed, tiled


def operands(tiled: TileTensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return tiled.tiles, tiled.scales, tiled.zeros, tiled.perm


@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("bits", BITS)
def test_opcheck_of_the_operators_over_tiles(
    bits: int, act_order: bool, device: torch.device
) -> None:
    k, n, group_size = 96, 64, 32
    packed, tiled = random_weight(bits, group_size, k, n, device, act_order=act_order)
    settings = bits, group_size, k, n
    x = torch.randn(2, 3, k, device=device, requires_grad=True)
    bias = torch.randn(n, device=device, requires_grad=True)
    torch.library.opcheck(OPS.repack_tiles, (packed.qweight, tiled.perm, bits, group_size))
    torch.library.opcheck(OPS.unrepack_tiles, (tiled.tiles, tiled.perm, *settings))
    torch.library.opcheck(OPS.dequantize_tiles, (*operands(tiled), *settings, torch.float16))
    torch.library.opcheck(OPS.q_matmul, (x, *operands(tiled), bias, *settings))
    half = x.detach().half()
    torch.library.opcheck(
        OPS.q_matmul, (half, tiled.tiles, tiled.scales, None, None, None, *settings)
    )


@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
@pytest.mark.parametrize("group_size", [16, 48, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_repacking_and_dequantizing_agree_with_plain_torch(
    bits: int, group_size: int, act_order: bool, device: torch.device
) -> None:
    for k, n in ((96, 32), (288, 160)):
        packed, tiled = random_weight(bits, group_size, k, n, device, act_order=act_order)
        settings = bits, group_size, k, n
        tiles = OPS.repack_tiles(packed.qweight, tiled.perm, bits, group_size)
        assert torch.equal(tiles, tiled.tiles)
        assert torch.equal(OPS.unrepack_tiles(tiles, tiled.perm, *settings), packed.qweight)
        arguments = (*vars(packed).values(), bits, 1)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            expected = reference.dequantize(*arguments, dtype)
            assert torch.equal(OPS.dequantize_tiles(*operands(tiled), *settings, dtype), expected)


def test_the_gradient_is_that_of_the_dense_product(device: torch.device) -> None:
    _, tiled = random_weight(4, 32, 96, 64, device, act_order=True)
    settings = 4, 32, 96, 64
    weight = OPS.dequantize_tiles(*operands(tiled), *settings, torch.float32)
    x = torch.randn(2, 3, 96, device=device, requires_grad=True)
    bias = torch.randn(64, device=device, requires_grad=True)
    grad = torch.randn(2, 3, 64, device=device)
    OPS.q_matmul(x, *operands(tiled), bias, *settings).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
