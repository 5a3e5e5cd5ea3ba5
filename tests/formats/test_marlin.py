"""Marlin's layout, against AutoGPTQ's own tensors and a list of places written out plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from auto_gptq.formats import marlin
from auto_gptq.formats.gptq import (
    has_middle_zeros,
    middle_zeros,
    pack_layer,
    trivial_g_idx,
    unpack_codes,
)

SHAPES = pytest.mark.parametrize(
    ("in_features", "out_features", "groups"),
    [(128, 256, 1), (256, 256, 2), (384, 512, 3), (256, 512, 1)],
)


def _plain_places() -> list[int]:
    """Where in a piece of 16 x 64 codes (four tiles, one after another) each code comes from."""
    places = []
    for lane in range(32):
        column, row = divmod(lane, 4)
        eight = [
            16 * r + column + 8 * block
            for block in (0, 1)
            for r in (2 * row, 2 * row + 1, 2 * (row + 4), 2 * (row + 4) + 1)
        ]
        for tile in range(4):
            here = [place + 256 * tile for place in eight]
            places += [here[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return places


def _plain_weight(codes: Tensor) -> Tensor:
    k, n = codes.shape
    rows = codes.reshape(k // 16, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    nibbles = rows[:, _plain_places()].reshape(k // 16, n * 2, 8).long()
    words = sum(nibbles[..., i] << 4 * i for i in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _plain_scales(scales: Tensor) -> Tensor:
    if len(scales) > 1:
        places = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        places = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scales.reshape(-1, len(places))[:, places].reshape(scales.shape)


@SHAPES
def test_tensors_are_those_of_the_plain_list_of_places(
    in_features: int, out_features: int, groups: int, device: torch.device
) -> None:
    codes = torch.randint(0, 16, (in_features, out_features))
    scales = torch.randn(groups, out_features).half()
    zeros = torch.full((out_features, groups), 8)
    g_idx = trivial_g_idx(in_features, in_features // groups)
    packed = pack_layer(codes.t(), scales.t(), zeros, g_idx, bits=4)
    b = marlin.to_marlin_weight(packed.qweight.to(device))
    s = marlin.swap_scales(packed.scales.to(device))
    assert torch.equal(b.cpu(), _plain_weight(codes))
    assert torch.equal(s.cpu(), _plain_scales(scales))
    assert (b.dtype, b.is_contiguous(), s.is_contiguous()) == (torch.int32, True, True)
    back = marlin.from_marlin_weight(b)
    assert torch.equal(back.cpu(), packed.qweight)
    assert torch.equal(unpack_codes(back, 4).cpu().long(), codes)
    assert torch.equal(marlin.swap_scales(s).cpu(), scales)


def test_tensors_are_those_of_autogptq(shared: Path) -> None:
    manifest: dict[str, dict[str, Any]] = json.loads(
        (shared / "golden" / "manifest.json").read_text()
    )
    seen = 0
    for name, settings in manifest.items():
        layer = load_file(shared / "golden" / f"{name}.safetensors")
        if "marlin_B" not in layer:
            continue
        seen += 1
        assert torch.equal(marlin.to_marlin_weight(layer["qweight"]), layer["marlin_B"]), name
        assert torch.equal(marlin.swap_scales(layer["scales"]), layer["marlin_s"]), name
        assert torch.equal(marlin.from_marlin_weight(layer["marlin_B"]), layer["qweight"]), name
        assert torch.equal(marlin.swap_scales(layer["marlin_s"]), layer["scales"]), name
        zeros = middle_zeros(len(layer["scales"]), settings["out_features"], 4, "gptq")
        assert torch.equal(zeros, layer["qzeros"]), name
    assert seen >= 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_middle_zeros_are_recognised(bits: int, checkpoint_format: str) -> None:
    zeros = torch.full((64, 3), 1 << (bits - 1))
    arguments = (torch.zeros(64, 96), torch.ones(64, 3), zeros, trivial_g_idx(96, 32))
    packed = pack_layer(*arguments, bits=bits, checkpoint_format=checkpoint_format)
    assert torch.equal(middle_zeros(3, 64, bits, checkpoint_format), packed.qzeros)
    assert has_middle_zeros(packed.qzeros, bits, checkpoint_format)
    zeros[5, 1] -= 1
    packed = pack_layer(*arguments, bits=bits, checkpoint_format=checkpoint_format)
    assert not has_middle_zeros(packed.qzeros, bits, checkpoint_format)


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, None),
        ({"group_size": -1}, None),
        ({"in_features": 384, "group_size": 384}, None),
        ({"bits": 8}, "8 bits; Marlin holds 4"),
        ({"symmetric": False}, "asymmetric"),
        ({"group_size": 64}, "group_size is 64; Marlin's is 128 or -1"),
        ({"in_features": 192}, "192 inputs to 256 outputs"),
        ({"out_features": 384}, "256 inputs to 384 outputs"),
    ],
)
def test_an_obstacle_is_put_into_words(change: dict[str, Any], obstacle: str | None) -> None:
    settings: dict[str, Any] = {
        "bits": 4,
        "in_features": 256,
        "out_features": 256,
        "group_size": 128,
        "symmetric": True,
    }
    found = marlin.find_obstacle(**settings | change)
    assert found == obstacle or (obstacle and found and obstacle in found)
