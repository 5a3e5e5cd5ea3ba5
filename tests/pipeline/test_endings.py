"""Full disks and Ctrl-C: a clear message, nothing half-written, and the run goes on afterwards."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq import BaseQuantizeConfig
from auto_gptq.checkpoint import safetensors_file
from auto_gptq.checkpoint.safetensors_file import Outgoing
from auto_gptq.errors import QuantizedStateError, StorageError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.pipeline import quantize as pipeline
from auto_gptq.pipeline.journal import MAY_CHANGE, Journal
from tests.tiny import tiny_examples, tiny_model

ROOT = Path(__file__).resolve().parents[2]


def _wrapper(**settings: Any) -> BaseGPTQForCausalLM:

    torch.manual_seed(0)
    config = BaseQuantizeConfig(**{"group_size": 32} | settings)
    return BaseGPTQForCausalLM(tiny_model(num_hidden_layers=3), False, config)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _wrapper()
    examples = tiny_examples(4, 64)
    whole.quantize(examples)
    calls = []
    get = Outgoing.get

    def full(self: Outgoing) -> Any:
        calls.append(self)
        if len(calls) == 45:  # in the midst of the second block's file
            raise OSError(errno.ENOSPC, "No space left on device")
        return get(self)

    monkeypatch.setattr(safetensors_file.Outgoing, "get", full)
    with pytest.raises(StorageError, match=rf"no room to write into {tmp_path} .*GB are free"):
        _wrapper().quantize(examples, work_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-00000.safetensors", "job.json"]
    again = _wrapper()
    again.quantize(examples, work_dir=tmp_path)
    tensors = whole.model.state_dict()
    assert all(bool((tensors[n] == t).all()) for n, t in again.model.state_dict().items())
    calls[:] = calls[:44]  # the next one is refused again
    assert len(calls) == 44
    target = tmp_path / "saved"
    with pytest.raises(StorageError, match="no room"):
        again.save_quantized(target)
    assert not target.exists()
    again.save_quantized(target)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The kernel ends the write, as a disk that is full does."""
    script = (
        "import resource, signal, sys, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from auto_gptq.checkpoint.safetensors_file import Outgoing, write_file\n"
        "from auto_gptq.checkpoint.writer import staged\n"
        "from auto_gptq.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "folder = Path(sys.argv[1])\n"
        "try:\n"
        "    with staged(folder) as stage:\n"
        "        write_file(stage / 'x', {'x': Outgoing.of(torch.zeros(100_000))}, {})\n"
        "except StorageError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "work"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "There is no room to write into" in run.stdout
    assert "File too large" in run.stdout
    assert not (tmp_path / "work").exists()


def test_ctrl_c_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples = tiny_examples(4, 64)
    solve = pipeline._Run._solve

    def interrupted(self: Any, index: int, *rest: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return solve(self, index, *rest)

    wrapper = _wrapper()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, "_solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wrapper.quantize(examples, work_dir=tmp_path)
    assert f"2 of 3 blocks are kept in {tmp_path}" in caplog.text
    with pytest.raises(QuantizedStateError, match="Load the model again"):
        wrapper.quantize(examples, work_dir=tmp_path)
    fresh = _wrapper()
    fresh.quantize(examples, work_dir=tmp_path)
    assert len(fresh.report) == 3 * 7


def test_the_table_of_what_may_change_is_what_decides(tmp_path: Path) -> None:
    Journal.open(tmp_path, {"bits": 4})
    assert not {"bits", "group_size", "damp_percent", "sym", "desc_act"} & MAY_CHANGE.keys()
    examples = tiny_examples(4, 64)
    work = tmp_path / "work"
    _wrapper().quantize(examples, work_dir=work)
    before = {p.name: p.read_bytes() for p in work.glob("block-*")}
    for change in ({"lm_head": True}, {"model_file_base_name": "other"}):
        assert change.keys() <= MAY_CHANGE.keys()
        _wrapper(**change).quantize(examples, work_dir=work)
    assert before.items() <= {p.name: p.read_bytes() for p in work.glob("block-*")}.items()
    assert (work / "block-00003.safetensors").is_file()  # the head
