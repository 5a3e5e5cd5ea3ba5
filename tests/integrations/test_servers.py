"""vLLM's and SGLang's own code gives the answers that test_servable.py compares ours with."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_servable import RECORDED, SETTINGS, saved

MISSING = [name for name in ("vllm", "sglang") if PathFinder.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason="needs the wheels: see tests/integrations/ask_servers.py")
def test_the_recorded_answers_are_what_the_servers_say(tmp_path: Path) -> None:
    folders = []
    for name, (settings, _) in SETTINGS.items():
        torch.manual_seed(0)
        folders.append(saved(tmp_path / name.replace(" ", "_"), **settings))
    script = Path(__file__).parent / "ask_servers.py"
    command = [sys.executable, str(script), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == RECORDED
