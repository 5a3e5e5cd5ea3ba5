"""Finished blocks on disk, so that a run that was ended at any moment can go on.

A folder holds ``job.json``, which says what is being made, and one file per finished block with the
solver's integers.  Each file is written aside and renamed into place: it is whole, or not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .._version import __version__
from ..calibration.examples import Batch
from ..checkpoint.safetensors_file import Outgoing, write_file
from ..checkpoint.writer import staged
from ..errors import ConfigError
from ..nn_modules.qlinear.linear import dense_weight
from ..quantization.config import BaseQuantizeConfig
from ..quantization.solver import Solution
from .block import Solved

logger = logging.getLogger(__name__)

_JOB = "job.json"
_TENSORS = ("codes", "scales", "zeros", "g_idx", "loss")
# Settings that do not change what is computed, only where it goes.
_MAY_CHANGE = ("model_name_or_path", "model_file_base_name", "lm_head", "checkpoint_format")


def describe_job(
    model: nn.Module, config: BaseQuantizeConfig, batches: Sequence[Batch], dtype: torch.dtype
) -> dict[str, Any]:
    """Say everything that the integers of a run depend on."""
    tokens = hashlib.sha256()
    for batch in batches:
        tokens.update(str(list(batch.input_ids.shape)).encode())
        tokens.update(batch.input_ids.numpy().tobytes())
        tokens.update(batch.attention_mask.numpy().tobytes())
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().flatten()[:64].float().cpu()
        weights.update(f"{name} {list(parameter.shape)}".encode() + few.numpy().tobytes())
    settings = {k: v for k, v in asdict(config).items() if k not in _MAY_CHANGE}
    # The v1 format forbids a zero point of 0; beside that, formats hold the same integers.
    return settings | {
        "zero_points_from": 0 if config.checkpoint_format == "gptq_v2" else 1,
        "examples": tokens.hexdigest(),
        "weights": weights.hexdigest(),
        "dtype": str(dtype),
        "auto_gptq": __version__,
    }


@dataclass(frozen=True)
class Journal:
    """The folder of one run."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path, job: dict[str, Any]) -> Journal:
        """Begin a run in a folder, or go on with the one that is there.

        :raises ConfigError: if the folder holds a run of something else; nothing is changed
        """
        journal = cls(Path(folder))
        file = journal.folder / _JOB
        if not file.is_file():
            with staged(journal.folder) as stage:
                (stage / _JOB).write_text(json.dumps(job, indent=2), encoding="utf-8")
            return journal
        for unfinished in journal.folder.glob(".partial-*"):  # left by a process that was killed
            shutil.rmtree(unfinished)
        before = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(job))
        changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        if changed:
            differences = ", ".join(
                f"{key} (was {before.get(key)!r}, is {now.get(key)!r})" for key in changed
            )
            raise ConfigError(
                f"{journal.folder} holds a run that differs in {differences}. Call quantize() as "
                "before to go on with it, or name another work_dir."
            )
        return journal

    def read(self, index: int, device: torch.device) -> list[Solved] | None:
        """Give a block's integers, None if it was not finished."""
        file = self._file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                entries = json.loads(opened.metadata()["modules"])
                return [_solved(opened, name, entry) for name, entry in entries.items()]
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); the block is solved again.", file, error)
            return None

    def write(self, index: int, done: Sequence[Solved]) -> None:
        """Keep a finished block."""
        tensors, entries = {}, {}
        for solved in done:
            for tensor in _TENSORS:
                value = getattr(solved.solution, tensor)
                tensors[f"{solved.name}.{tensor}"] = Outgoing.of(value)
            entries[solved.name] = {
                "error": solved.error,
                "tokens": solved.tokens,
                "seconds": solved.seconds,
                "damp_percent": solved.solution.damp_percent,
            }
        with staged(self.folder) as stage:
            path = stage / self._file(index).name
            write_file(path, tensors, {"modules": json.dumps(entries)})

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"


def _solved(opened: Any, name: str, entry: dict[str, Any]) -> Solved:
    codes, scales, zeros, g_idx, loss = (
        opened.get_tensor(f"{name}.{tensor}") for tensor in _TENSORS
    )
    solution = Solution(codes, scales, zeros, g_idx, loss, entry.pop("damp_percent"))
    return Solved(name, solution, **entry)


def restore(block: nn.Module, done: Sequence[Solved]) -> None:
    """Leave the dequantized weights in a block, as the solver does."""
    for solved in done:
        weight = dense_weight(block.get_submodule(solved.name))
        weight.copy_(solved.solution.dequantize().to(weight.dtype))
