"""What is still free follows the tightest limit."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq.calibration import memory

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = memory._kilobytes("/proc/self/status", "VmData:") + 50_000_000
    own = resource.getrlimit

    def limited(kind: int) -> Any:
        return (allowed, allowed) if kind == resource.RLIMIT_DATA else own(kind)

    before = memory.free_bytes(CPU)
    monkeypatch.setattr(resource, "getrlimit", limited)
    assert memory.free_bytes(CPU) <= min(50_000_000, before + 2**30)


def test_a_limit_of_the_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("30000000\n")
    (tmp_path / "memory.current").write_text("10000000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes(CPU) <= 20_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 20_000_000
    (tmp_path / "memory.max").write_text("5000000\n")
    assert memory.free_bytes(CPU) == 0  # more is used already, as after a limit was lowered


def test_half_of_all_memory_is_never_exceeded() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.free_bytes(CPU) <= total // 2
