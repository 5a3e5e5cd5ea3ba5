"""The Triton kernels give what the plain versions give; on a CPU in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq.formats.tiles import TileTensors, order_for_lanes, to_tiles
from auto_gptq.kernels import reference
from auto_gptq.nn_modules.qlinear import QuantLinear

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
triton_ops = pytest.importorskip("auto_gptq.kernels.triton_ops")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Settings = tuple[int, int, int, int]


@pytest.fixture(autouse=True)
def numbers_out_of_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter take a loop's bounds out of arrays ``[1]``.

    Before Triton 3.7 it does so in a way that NumPy 2.4 refuses, and each product was a TypeError.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


def weight(
    bits: int, group_size: int, sym: bool, ordered: bool, shape: tuple[int, int]
) -> tuple[TileTensors, Settings]:
    """Random tiles ``[K, N]`` and their settings."""
    in_features, out_features = shape
    layer = QuantLinear(bits, group_size, *shape, False, checkpoint_format="gptq_v2")
    g_idx = torch.arange(in_features) // layer.group_size
    zeros = torch.randint(0, 1 << bits, (out_features, int(g_idx[-1]) + 1))
    layer.pack_codes(
        torch.randint(0, 1 << bits, (out_features, in_features)),
        torch.rand(zeros.shape) * 0.1 + 0.01,
        torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros,
        g_idx if ordered else g_idx[torch.randperm(in_features)],
    )
    layer.to(DEVICE)
    settings = bits, layer.group_size, in_features, out_features
    return to_tiles(layer.packed(), bits, layer.group_size, 0), settings


def in_order_of_lanes(tiled: TileTensors, bits: int) -> list[Tensor | None]:
    """Give the tensors as they would lie on a GPU."""
    tiles = order_for_lanes(tiled.tiles) if bits == 4 and DEVICE.type == "cpu" else tiled.tiles
    return [tiles, tiled.scales, tiled.zeros, tiled.perm]


CASES = [
    (64, True, True, (256, 128)),
    (32, False, True, (192, 96)),
    (-1, False, True, (320, 64)),
    (16, False, False, (128, 192)),
    (128, True, False, (256, 64)),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "sym", "ordered", "shape"), CASES, ids=str)
def test_triton_agrees_with_plain_torch(
    bits: int, group_size: int, sym: bool, ordered: bool, shape: tuple[int, int]
) -> None:
    tiled, settings = weight(bits, group_size, sym, ordered, shape)
    dense = reference.dequantize_tiles(*vars(tiled).values(), *settings, torch.float32)
    tensors = in_order_of_lanes(tiled, bits)
    assert torch.equal(triton_ops.dequantize_tiles(*tensors, *settings, torch.float32), dense)
    bias = torch.randn(shape[1], device=DEVICE)
    for rows in (1, 2, 3, 20, 70):
        x = torch.randn(rows, shape[0], device=DEVICE)
        wanted = (x.double() @ dense.double().t() + bias).float()
        found = triton_ops.q_matmul(x, *tensors, bias, *settings)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_activations_of_any_shape_and_half_precision(rows: int) -> None:
    tiled, settings = weight(4, 64, True, True, (256, 128))
    dense = reference.dequantize_tiles(*vars(tiled).values(), *settings, torch.float64)
    tensors = in_order_of_lanes(tiled, 4)
    x = torch.randn(256, rows, 2, device=DEVICE, dtype=torch.float16).permute(1, 2, 0)
    found = triton_ops.q_matmul(x, *tensors, None, *settings)
    assert found.shape == (rows, 2, 128) and found.dtype == torch.float16
    wanted = x.double() @ dense.t()
    assert (found.double() - wanted).norm() / wanted.norm() < 1e-3
