"""Finished blocks on disk, so that a run that was ended at any moment can go on.

A folder holds ``job.json``, which says what is being made, and one file per finished block with its
packed layers.  Each file is written aside and renamed into place: it is whole, or not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._version import __version__
from ..calibration.examples import Batch
from ..checkpoint.safetensors_file import Outgoing, write_file
from ..checkpoint.writer import staged
from ..errors import ConfigError
from ..nn_modules.qlinear.linear import QuantLinear, dense_weight
from ..nn_modules.surgery import empty_quant_linear
from ..quantization.config import BaseQuantizeConfig
from .report import ModuleReport

logger = logging.getLogger(__name__)

_JOB = "job.json"
# What may differ when a run goes on, and why.  All else decides on the integers.
MAY_CHANGE = {
    "model_name_or_path": "only says where the model lies",
    "model_file_base_name": "names the files that are saved in the end",
    "lm_head": "the output head comes after all blocks",
    "checkpoint_format": "all formats hold the same integers, but for zero points of 0",
    "show_progress": "is only shown",
    "device_map": "the weights are the same, in memory or on disk",
    "number of ranks": "all ranks make the same blocks",
}
_FIRST_NUMBERS = 64  # of each parameter, to tell one model from another


def describe_job(
    model: nn.Module,
    config: BaseQuantizeConfig,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    read_first: Callable[[str, int], Tensor] | None = None,
) -> dict[str, Any]:
    """Say everything that the integers of a run depend on.

    :param read_first: gives the first numbers of a parameter that lies on disk
    """
    tokens = hashlib.sha256()
    for batch in batches:
        tokens.update(str(list(batch.input_ids.shape)).encode())
        tokens.update(batch.input_ids.numpy().tobytes())
        tokens.update(batch.attention_mask.numpy().tobytes())
        for name, value in sorted(batch.others.items()):
            tokens.update(name.encode())
            _add(value, tokens.update)
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().flatten()[:_FIRST_NUMBERS]
        if few.is_meta and read_first is not None:
            few = read_first(name, _FIRST_NUMBERS)
        few = few.float().cpu()
        weights.update(f"{name} {list(parameter.shape)}".encode() + few.numpy().tobytes())
    settings = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
    # The v1 format forbids a zero point of 0; beside that, formats hold the same integers.
    return settings | {
        "zero_points_from": 0 if config.checkpoint_format == "gptq_v2" else 1,
        "examples": tokens.hexdigest(),
        "weights": weights.hexdigest(),
        "dtype": str(dtype),
        "auto_gptq": __version__,
    }


def _add(value: Any, update: Callable[[bytes], None]) -> None:
    """Hash an image, a sound or what else a processor returns: tensors, arrays, lists of them."""
    if isinstance(value, Tensor):
        kept = value.detach().cpu().contiguous()
        update(f"{list(kept.shape)} {kept.dtype}".encode())
        update(kept.view(torch.uint8).numpy().tobytes() if kept.dim() else str(kept).encode())
    elif isinstance(value, (list, tuple)):
        update(str(len(value)).encode())
        for each in value:
            _add(each, update)
    elif hasattr(value, "tobytes") and hasattr(value, "shape"):  # a numpy array
        update(f"{value.shape} {value.dtype}".encode() + value.tobytes())
    else:
        update(repr(value).encode())


@dataclass(frozen=True)
class Finished:
    """A block's layers by their names in it, and how they came about."""

    layers: dict[str, QuantLinear]
    report: list[ModuleReport]


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
        for kind in (".partial-*", ".activations-*"):  # left by a process that was killed
            for unfinished in journal.folder.glob(kind):
                shutil.rmtree(unfinished)
        return journal

    def file(self, index: int) -> Path:
        """Give the file of a block; the output head comes after the last."""
        return self.folder / f"block-{index:05}.safetensors"

    def finished(self) -> int:
        """Count the blocks that are there."""
        return len(list(self.folder.glob("block-*.safetensors")))

    def read(
        self,
        index: int,
        parent: nn.Module,  # the block, which still has its dense linears
        name: str,  # of the block in the model
        settings: Mapping[str, BaseQuantizeConfig],  # by full name
        device: torch.device,
    ) -> Finished | None:
        """Give a block's layers, None if it was not finished."""
        file = self.file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                entries = [ModuleReport(**e) for e in json.loads(opened.metadata()["modules"])]
                layers = {}
                for entry in entries:
                    inside = entry.name.removeprefix(f"{name}.") if name else entry.name
                    own = settings[entry.name]
                    layer = empty_quant_linear(
                        parent.get_submodule(inside),
                        own.bits,
                        own.group_size,
                        own.checkpoint_format,
                    )
                    for leaf in layer.state_dict():
                        layer._buffers[leaf] = opened.get_tensor(f"{entry.name}.{leaf}")
                    layers[inside] = layer.to(device)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); the block is solved again.", file, error)
            return None
        return Finished(layers, entries)

    def write(
        self, index: int, layers: Mapping[str, QuantLinear], report: Sequence[ModuleReport]
    ) -> None:
        """Keep a finished block.

        :param layers: by their full names
        :raises StorageError: (an OSError) if the disk is full
        """
        tensors = {
            f"{name}.{leaf}": Outgoing.of(tensor)
            for name, layer in layers.items()
            for leaf, tensor in layer.state_dict().items()
        }
        with staged(self.folder) as stage:
            path = stage / self.file(index).name
            write_file(path, tensors, {"modules": json.dumps([asdict(entry) for entry in report])})


def restore(block: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Leave the dequantized weights in a block, as the solver does."""
    for name, layer in layers.items():
        weight = dense_weight(block.get_submodule(name))
        weight.copy_(layer.dequantize(weight.dtype))
