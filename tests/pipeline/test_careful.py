"""Poor data is solved as well as it can be, and said; broken numbers are refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq import BaseQuantizeConfig
from auto_gptq.errors import NumericsError
from auto_gptq.formats.grid import GridRule
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.pipeline.careful import blend, solve_carefully
from auto_gptq.quantization import hessian as hessian_module
from auto_gptq.quantization.solver import SolverOptions, squared_error
from tests.tiny import tiny_examples, tiny_model

OPTIONS = SolverOptions(GridRule(3), group_size=32, act_order=True, static_groups=True)


def _correlated(tokens: int, size: int, device: Any) -> torch.Tensor:
    mix = torch.randn(size, size) / size**0.5 + torch.eye(size)
    return (torch.randn(tokens, size) @ mix).to(device)


def test_too_few_tokens_are_blended_which_helps_on_other_tokens(device: Any) -> None:
    """64 inputs, 24 tokens: the whole Hessian knows nothing of 40 directions."""
    x = _correlated(4000, 64, device)
    few, others = x[:24], x[24:]
    weight = torch.randn(96, 64, device=device)
    sums, wanted = few.t() @ few / 24, others.t() @ others / len(others)
    found, note = solve_carefully(weight, sums, 24, OPTIONS)
    assert "24 calibration tokens, fewer than its 64 inputs" in note
    plain, silence = solve_carefully(weight, sums, 64, OPTIONS)  # as if they were enough
    assert silence == ""
    blended, whole = (squared_error(weight, s.dequantize(), wanted) for s in (found, plain))
    assert blended < whole
    assert torch.equal(blend(sums, 1.0), sums)
    assert torch.equal(blend(sums, 0.0), sums.diagonal().diag())


def test_no_token_at_all_is_rounding_and_never_zeros(device: Any) -> None:
    weight = torch.randn(32, 64, device=device)
    found, note = solve_carefully(weight, torch.zeros(64, 64, device=device), 0, OPTIONS)
    assert note == "saw no calibration token; its weights are only rounded."
    assert (found.dequantize() - weight).norm() < 0.3 * weight.norm()


def test_a_hessian_without_a_factor_falls_back_to_rounding(
    monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    def fails(matrix: torch.Tensor) -> Any:
        return matrix, torch.tensor(1)

    monkeypatch.setattr(hessian_module.torch.linalg, "cholesky_ex", fails)
    weight = torch.randn(32, 64, device=device)
    found, note = solve_carefully(weight, torch.eye(64, device=device), 100, OPTIONS)
    assert note.startswith("was only rounded: The Hessian cannot be factored at any damp_percent")
    assert (found.dequantize() - weight).norm() < 0.3 * weight.norm()


def test_damping_is_raised_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An indefinite Hessian: what a sum in too low a precision can give."""
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    found, note = solve_carefully(torch.randn(32, 64), hessian, 100, OPTIONS)
    assert found.damp_percent > OPTIONS.damp_percent
    assert note == ""  # the report says it by the damping itself
    assert "not positive definite at damp_percent 0.01" in caplog.text


def _quantized(model: Any, examples: Any, **settings: Any) -> BaseGPTQForCausalLM:
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(group_size=32, **settings))
    wrapper.quantize(examples)
    return wrapper


def test_a_run_on_few_tokens_says_so_of_each_module(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrapper = _quantized(tiny_model(), tiny_examples(2, 16))  # 32 tokens, 64 and 96 inputs
    assert all("32 calibration tokens" in entry.note for entry in wrapper.report)
    assert "mlp.down_proj: saw 32 calibration tokens, fewer than its 96 inputs" in caplog.text
    wrapper.save_quantized(tmp_path)
    written = json.loads((tmp_path / "quantization_report.json").read_text())
    assert len(written["warnings"]) >= len(wrapper.report) == len(written["modules"])


def test_padding_counts_nowhere() -> None:
    """The same rows, once with padding on their left that holds other tokens."""
    model = tiny_model(dtype=torch.float32).eval()
    examples = tiny_examples(4, 48)
    padded = [
        {
            "input_ids": torch.cat([torch.full((16,), 7), e["input_ids"]]),
            "attention_mask": torch.cat([torch.zeros(16, dtype=torch.int64), e["attention_mask"]]),
        }
        for e in examples
    ]

    plain = _quantized(copy.deepcopy(model), examples)
    masked = _quantized(model, padded)
    assert [e.tokens for e in masked.report] == [e.tokens for e in plain.report]
    for one, other in zip(plain.report, masked.report, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.1)


def test_overflow_of_float16_names_the_block_and_what_to_do(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "auto_gptq.pipeline.quantize.execution_dtype", lambda dtype, _device: dtype
    )  # as on a GPU: float16 stays float16
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2e4)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2e4)
    with pytest.raises(NumericsError, match=r"layers\.1: .*(infinity|NaN).*bfloat16"):
        _quantized(model, tiny_examples(4, 32))
