"""Checkpoints in every shape in which transformers meets them, and what they must compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import BaseGPTQForCausalLM
from tests.tiny import tiny_examples, tiny_model

IDS = torch.tensor([[5, 9, 250, 3, 77, 8, 8, 120, 31, 64, 2, 199]])
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def make(folder: Path, model_type: str, settings: dict[str, Any], **extra: Any) -> Path:
    """Quantize a tiny model and save it as ``model.safetensors`` with its settings in config.json.

    ``quantize_config.json`` is left out, which transformers does not read.
    """
    torch.manual_seed(0)
    config = BaseQuantizeConfig(**{"group_size": 32, "model_file_base_name": "model"} | settings)
    wrapper = BaseGPTQForCausalLM(tiny_model(model_type, **extra), False, config)
    wrapper.quantize(tiny_examples())
    wrapper.save_quantized(folder)
    (folder / "quantize_config.json").unlink()
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, whatever its files are called."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def settings_of(folder: Path) -> dict[str, Any]:
    """Read the quantization settings in config.json."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(settings, dict)
    return settings


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Cut the bit strings along dimension 0 into codes."""
    bytes_ = np.ascontiguousarray(words.astype("<u4").T).view(np.uint8)
    string = np.unpackbits(bytes_, axis=1, bitorder="little")
    parts = string.reshape(len(string), -1, bits) * (1 << np.arange(bits))
    return parts.sum(-1).T


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Give a checkpoint's tensors with each packed linear as a dense fp32 ``weight``.

    Written from the format's description, with NumPy, so that it shares nothing with the package.
    """
    stored, settings = tensors_of(folder), settings_of(folder)
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    dense = {name: t.float() for name, t in stored.items() if name.split(".")[-1] not in PACKED}
    for name in [name[: -len(".qweight")] for name in stored if name.endswith(".qweight")]:
        qweight, qzeros = (stored[f"{name}.{leaf}"].numpy() for leaf in PACKED[:2])
        scales = stored[f"{name}.scales"].float().numpy()
        bits = 32 * qzeros.shape[1] // scales.shape[1]
        codes = _codes(qweight, bits)
        zeros = (_codes(qzeros.T, bits).T + offset) % (1 << bits)
        size = -(-len(codes) // len(scales))
        trivial = np.arange(len(codes)) // size
        group = stored[f"{name}.g_idx"].numpy() if f"{name}.g_idx" in stored else trivial
        weight = (codes - zeros[group]) * scales[group]
        dense[f"{name}.weight"] = torch.from_numpy(weight.T.astype(np.float32)).contiguous()
    return dense


def dense_twin(folder: Path, model_type: str, target: Path) -> Path:
    """Write the full-precision model that a packed checkpoint stands for."""
    tensors = dequantized(folder)
    if model_type == "gpt2":  # Conv1D keeps [in, out]
        packed = {name for name in tensors_of(folder) if name.endswith(".qweight")}
        for name in packed:
            weight = name.replace("qweight", "weight")
            tensors[weight] = tensors[weight].t().contiguous()
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def edited(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> Path:
    """Copy a checkpoint and change its tensors and its config.json."""
    shutil.copytree(folder, target)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target
