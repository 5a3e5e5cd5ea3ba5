"""The table of kernels: who serves a weight, and why others do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from auto_gptq.kernels import choose, native
from auto_gptq.kernels.choose import KERNELS, Kernel, Weight
from auto_gptq.nn_modules.qlinear import QuantLinear

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def refusal(name: str, weight: Weight) -> str | None:
    (row,) = (kernel for kernel in KERNELS if kernel.name == name)
    return row.refusal(weight)


def test_plain_torch_comes_last_and_serves_everything() -> None:
    assert KERNELS[-1] == Kernel("torch", "gptq", None)
    assert choose.choose(Weight(torch.device("meta"), 4, 128)).name == "torch"


def test_the_page_has_all_kernels_in_their_order() -> None:
    """Triton stood in the table, but on no page."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "kernels.md"
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(kernel.name, kernel.layout) for kernel in KERNELS]


@pytest.mark.skipif(not native.load(), reason=native.reason())
def test_the_compiled_kernel_serves_the_cpu() -> None:
    assert refusal("cpu", Weight(CPU, 4, 128)) is None
    assert (
        refusal("cpu", Weight(torch.device("meta"), 4, 128)) == "the weight is on meta, not on cpu"
    )


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight(CPU, 4, 128), "the weight is on cpu, not on cuda"),
        (Weight(GPU, 4, 24), "group_size is 24, which is not a multiple of 16"),
        (Weight(GPU, 4, 32, "g_idx is odd"), "g_idx is odd"),
    ],
    ids=["device", "group", "order"],
)
def test_a_refusal_gives_the_first_reason(weight: Weight, reason: str) -> None:
    assert refusal("cuda", weight) == reason


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "it is not there")
    assert refusal("cuda", Weight(GPU, 4, 128)) == "it is not there"
    assert choose.explain(Weight(CPU, 4, 128)).endswith("it is not there\ntorch: runs")


@pytest.mark.gpu
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert refusal("cuda", Weight(GPU, 4, 128)) == "cuda:0 is sm_70, older than sm_75"


@pytest.mark.gpu
def test_a_layer_on_a_gpu_says_that_it_runs_there() -> None:
    layer = QuantLinear(4, 32, 64, 64, bias=False).to(GPU)
    layer.prepare()
    assert layer.explain() == "cuda: runs"
