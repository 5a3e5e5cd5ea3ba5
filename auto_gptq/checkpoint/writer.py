"""Write a checkpoint so that under its final names there is always a whole one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty folder whose files move into ``folder`` when the block ends well.

    Each file is renamed into place, in the order of names given by ``sorted`` with JSON files
    last, so that an index never names a file that is not there.  After an error nothing is left.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield stage
        for path in sorted(stage.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
            _flush(path)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(stage)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def write_weights(
    tensors: Mapping[str, Tensor],
    folder: Path,
    base_name: str,
    *,
    metadata: Mapping[str, str],
    use_safetensors: bool = True,
) -> None:
    """Write named tensors as one file, with an index under the name that transformers looks for.

    transformers opens ``model.safetensors`` or what ``model.safetensors.index.json`` lists, so the
    index lets it find a file called ``gptq_model-4bit-128g.safetensors``.
    """
    # Views (of a fused parameter, say) would drag their whole storage along.
    compact = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if not use_safetensors:
        torch.save(compact, folder / f"{base_name}.bin")
        return
    name = f"{base_name}.safetensors"
    save_file(compact, folder / name, metadata=dict(metadata))
    if base_name != "model":
        size = sum(tensor.nbytes for tensor in compact.values())
        index = {
            "metadata": {"total_size": size},
            "weight_map": dict.fromkeys(sorted(compact), name),
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _flush(path: Path) -> None:
    """Make a file's bytes durable before its name is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
