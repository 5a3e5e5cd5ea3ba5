"""The Triton kernels give what plain torch gives: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from auto_gptq.formats.grid import GridRule
from auto_gptq.kernels import reference
from tests.kernels.test_ops import GROUP, _block, _groups

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
# Others' plugins warn where they meet each other, and a warning is an error here.
PLAIN = [word for name in ("cacheprovider", "xdist", "benchmark") for word in ("-p", f"no:{name}")]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
here = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or the interpreter"
)


@pytest.fixture
def on() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@here
@pytest.mark.parametrize("columns", [40, 120, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_solve_columns(columns: int, sign: int, on: torch.device) -> None:
    from auto_gptq.kernels import triton_solver

    plain = _block(on, columns)
    plain["scales"] = plain["scales"] * sign
    ours = {k: v.clone() if k not in {"inverse", "maxq"} else v for k, v in plain.items()}
    triton_solver.solve_columns(**ours)
    reference.solve_columns(**plain)
    # A code may fall to the other side of a tie in the last bit, and its row differs from there.
    same = (ours["codes"] == plain["codes"]).all(0)
    assert same.float().mean() > 0.95
    for name in ("weight", "errors"):
        assert torch.allclose(ours[name][:, same], plain[name][:, same], atol=1e-4), name


@here
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fit_grids(symmetric: bool, bits: int, scale_dtype: torch.dtype, on: torch.device) -> None:
    from auto_gptq.kernels import triton_solver

    if INTERPRETED and scale_dtype == torch.bfloat16:
        pytest.skip("Triton 3.6 cuts bfloat16 off in its interpreter")
    arguments = _groups(on, GridRule(bits, symmetric, scale_dtype, signed=True))
    arguments[0][GROUP : 2 * GROUP, 3] = 0  # a group of zeros
    found = triton_solver.fit_grids(*arguments)
    expected = reference.fit_grids(*arguments)
    # A GPU's plain torch divides by a number as it multiplies by its inverse.
    same = torch.isclose(found[0], expected[0], rtol=1e-6) & (found[1] == expected[1])
    assert (~same).float().mean() < 0.01  # equal errors, summed in another order
    assert found[0][1, 3] == 1


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *PLAIN, __file__],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
