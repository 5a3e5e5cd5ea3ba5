"""Importing the package costs next to nothing and changes nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import auto_gptq

_PROBE = """
import logging, sys, time, warnings
import torch, transformers
def state():
    root = logging.getLogger()
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.nn.init.kaiming_uniform_,
        torch.nn.Linear.forward,
        transformers.AutoModelForCausalLM.from_pretrained.__func__,
        list(root.handlers), root.level,
        {n for n in logging.root.manager.loggerDict if n.startswith("auto_gptq") and
         getattr(logging.getLogger(n), "handlers", [])},
        list(warnings.filters),
    )
before = state()
started = time.perf_counter()
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
seconds = time.perf_counter() - started
assert state() == before, (state(), before)
print(f"{seconds:.3f}", file=sys.stderr)
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_importing_prints_nothing_changes_nothing_and_takes_under_two_seconds() -> None:
    probe = _run(_PROBE)
    assert probe.stdout == ""
    assert float(probe.stderr.strip()) < 2.0


def test_importing_the_package_alone_imports_neither_torch_nor_transformers() -> None:
    started = time.perf_counter()
    probe = _run(
        "import sys, auto_gptq; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert probe.stdout.strip() == "[]"
    assert time.perf_counter() - started < 2.0


def test_public_names_are_sorted_complete_and_there() -> None:
    assert auto_gptq.__all__ == sorted(auto_gptq.__all__)
    assert set(auto_gptq.__all__) <= set(dir(auto_gptq))
    for name in auto_gptq.__all__:
        assert getattr(auto_gptq, name) is not None
