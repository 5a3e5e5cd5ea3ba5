"""Several processes give the codes of one, and all of them the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq import BaseQuantizeConfig
from auto_gptq.calibration.examples import Batch
from auto_gptq.errors import ConfigError
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.pipeline.ranks import Ranks
from auto_gptq.quantization.solver import part_rows
from tests.tiny import tiny_examples, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
from tests.pipeline.test_ranks import quantize_here
if sys.argv[3] == "joined":  # else torchrun's processes are joined without being told
    torch.distributed.init_process_group("gloo")
quantize_here(sys.argv[1], float(sys.argv[2]))
torch.distributed.destroy_process_group()
"""


def quantize_here(folder: str | Path, correction: float) -> None:
    """Do what a user's script does, on any number of ranks."""
    torch.manual_seed(0)
    model = tiny_model(hidden_size=128, intermediate_size=256)
    config = BaseQuantizeConfig(
        group_size=32, static_groups=True, correction=correction, scale_epochs=int(correction > 0)
    )
    wrapper = BaseGPTQForCausalLM(model, False, config)
    wrapper.quantize(tiny_examples(7, 64), work_dir=f"{folder}/work")
    wrapper.save_quantized(f"{folder}/saved")
    torch.save(wrapper.model.state_dict(), f"{folder}/{Ranks.current().rank}.pt")


def _start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments[:-2], str(folder / "script.py"), str(folder)]
    return subprocess.Popen(
        [*command, *arguments[-2:]], cwd=ROOT, env=given, stderr=subprocess.PIPE, text=True
    )


def _loaded(folder: Path, count: int, processes: list[subprocess.Popen[str]]) -> list[Any]:
    for process in processes:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def test_two_ranks_give_the_bytes_of_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [_start(tmp_path, "0", "joined", RANK=str(i), **address) for i in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "one").mkdir()
    quantize_here(tmp_path / "one", 0.0)
    torch.set_num_threads(threads)
    both = _loaded(tmp_path, 2, processes)
    alone = torch.load(tmp_path / "one" / "0.pt")
    for found in both:
        assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())
    one, two = (
        (folder / "saved" / "gptq_model-4bit-32g.safetensors").read_bytes()
        for folder in (tmp_path / "one", tmp_path)
    )
    assert one == two


@pytest.mark.slow
def test_three_ranks_of_torchrun_agree_with_each_other(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    first, *others = _loaded(tmp_path, 3, [_start(tmp_path, *torchrun, "0.5", "alone")])
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_batches_are_shared_and_cut_where_they_are_too_few() -> None:
    batches = [Batch(torch.full((4, 8), i), torch.ones(4, 8)) for i in range(2)]
    shares = [Ranks(rank, 3).share(batches) for rank in range(3)]
    rows = [row for share in shares for batch in share for row in batch.input_ids.tolist()]
    assert rows == torch.cat([batch.input_ids for batch in batches]).tolist()
    assert all(shares)
    with pytest.raises(ConfigError, match="8 calibration rows cannot be shared by 9 ranks"):
        Ranks(0, 9).share(batches)


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [
        (256, 2, [(0, 128), (128, 256)]),
        (200, 2, [(0, 128), (128, 200)]),
        (64, 2, [(0, 64)]),
        (300, 4, [(0, 128), (128, 256), (256, 300)]),
        (5, 1, [(0, 5)]),
    ],
)
def test_rows_are_parted_at_multiples_of_64(
    rows: int, parts: int, expected: list[tuple[int, int]]
) -> None:
    found = [(part.start, part.stop) for part in part_rows(rows, parts)]
    assert found == expected or (len(expected) < parts and found == [(0, rows)])
