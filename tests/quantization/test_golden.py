"""Layers solved and packed by AutoGPTQ 0.8.0.dev0 itself (in ../shared, where there is one)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from auto_gptq import BaseQuantizeConfig
from auto_gptq.formats.gptq import pack_layer
from auto_gptq.formats.grid import GridRule
from auto_gptq.pipeline.plan import solver_options
from auto_gptq.quantization.solver import SolverOptions, solve, squared_error

# AutoGPTQ's own packing overwrote zero points here: a zero point of 0 became 0xFFFFFFFF.
QZEROS_NO_MODEL = {"b2_g64_asym_act_128x64_bias"}


@pytest.fixture(scope="module")
def layers(shared: Path) -> dict[str, tuple[dict[str, object], dict[str, torch.Tensor]]]:
    manifest = json.loads((shared / "golden" / "manifest.json").read_text())
    return {
        name: (settings, load_file(shared / "golden" / f"{name}.safetensors"))
        for name, settings in manifest.items()
    }


def test_packing_is_byte_identical(layers) -> None:  # type: ignore[no-untyped-def]
    assert len(layers) >= 12
    for name, (settings, layer) in layers.items():
        group = layer["g_idx"].long()
        scales, zeros = layer["solver_scales"], layer["solver_zeros"]
        codes = torch.round(layer["solved_weight"] / scales[:, group] + zeros[:, group])
        packed = pack_layer(codes, scales, zeros, layer["g_idx"], bits=settings["bits"])
        for tensor in ("qweight", "qzeros", "scales", "g_idx"):
            if tensor == "qzeros" and name in QZEROS_NO_MODEL:
                continue
            ours = getattr(packed, tensor)
            assert ours.dtype == layer[tensor].dtype, (name, tensor)
            assert torch.equal(ours, layer[tensor]), (name, tensor)


def test_the_solver_is_nowhere_worse_than_autogptq(layers) -> None:  # type: ignore[no-untyped-def]
    for name, (settings, layer) in layers.items():
        # AutoGPTQ's errors are those of unrounded scales, so ours are taken with such, too.
        rule = GridRule(settings["bits"], settings["sym"], scale_dtype=torch.float32)
        options = SolverOptions(
            rule,
            settings["group_size"],
            settings["percdamp"],
            settings["desc_act"],
            settings["static_groups"],
        )
        found = solve(layer["weight"], layer["hessian"], options)
        ours = squared_error(layer["weight"], found.dequantize(), layer["hessian"])
        theirs = squared_error(layer["weight"], layer["solved_weight"], layer["hessian"])
        assert ours <= theirs * 1.001, f"{name}: {float(ours / theirs)}"
        if settings["bits"] < 8:
            assert ours < theirs * 0.97, f"{name}: the scale search gains nothing"
        assert torch.equal(found.g_idx, layer["g_idx"]), name


@pytest.mark.parametrize("preset", ["default", "best"])
def test_presets_are_nowhere_worse_than_autogptq(layers, preset: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever AutoGPTQ's settings were, and with scales as they are stored."""
    for name, (settings, layer) in layers.items():
        bits, group_size = settings["bits"], settings["group_size"]
        config = BaseQuantizeConfig.preset(preset, bits, group_size, sym=settings["sym"])
        found = solve(layer["weight"], layer["hessian"], solver_options(config))
        ours = squared_error(layer["weight"], found.dequantize(), layer["hessian"])
        theirs = squared_error(layer["weight"], layer["solved_weight"], layer["hessian"])
        assert ours < theirs, f"{name}: {float(ours / theirs)}"
