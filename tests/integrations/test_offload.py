"""accelerate keeps packed weights away from the device, and fetches them for each use."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_gptq.nn_modules.qlinear import QuantLinear
from tests.integrations.checkpoints import IDS, edited, make
from tests.integrations.test_transformers import V5, _without_g_idx

# Offloaded layers run on other kernels, whose sums are rounded to float16's 11 bits elsewhere.
CLOSE = 2**-8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    return make(folder / "packed", "llama", {"static_groups": True})


def _load(folder: Path, **options: Any) -> Any:
    # In the dtype of the files: what transformers 4 reads from disk for each use stays as it is.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **options)


def _map(device: torch.device, second: str) -> dict[str, Any]:
    near = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(near, str(device)) | {"model.layers.1": second}


def _resident(model: Any) -> int:
    """Count the bytes of packed tensors that lie in memory of the device, or on a CPU at all."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return sum(b.nbytes for layer in layers for b in layer.buffers() if not b.is_meta)


@pytest.mark.parametrize("order", ["stored", "not stored"])
def test_disk_offload_holds_half_the_packed_weights_and_computes_the_same(
    order: str, checkpoint: Path, tmp_path: Path, device: torch.device
) -> None:
    folder = checkpoint
    if order == "not stored":
        folder = edited(checkpoint, tmp_path / "edited", _without_g_idx)
    whole = _load(folder, device_map={"": str(device)})
    wanted = whole(IDS.to(device)).logits
    model = _load(
        folder,
        device_map=_map(device, "disk"),
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=True,
    )
    for _ in range(2):  # once more, with what the first call left behind
        assert (model(IDS.to(device)).logits - wanted).abs().max() <= CLOSE * wanted.abs().max()
        assert _resident(model) <= 0.55 * _resident(whole)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = IDS.to(device)
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_cpu_offload_frees_the_device(kind: str, tmp_path: Path) -> None:
    """A router was fetched in the checkpoint's dtype, where transformers before 5.20 renamed it."""
    device, folder = torch.device("cuda:0"), make(tmp_path / "packed", kind, {})
    whole = _load(folder, device_map={"": str(device)})
    model = _load(folder, device_map=_map(device, "cpu"), offload_buffers=True)
    ids = IDS.to(device)
    wanted = whole(ids).logits
    assert (model(ids).logits - wanted).abs().max() <= CLOSE * wanted.abs().max()
    assert _resident(model) <= 0.55 * _resident(whole)


@pytest.mark.skipif(not V5, reason="transformers 4 fails to place offloaded buffers")
def test_offloading_that_saves_nothing_is_said(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    """accelerate leaves buffers on the device unless told otherwise; ours are buffers."""
    caplog.set_level(logging.WARNING, "auto_gptq")
    model = _load(checkpoint, device_map=_map(device, "disk"), offload_folder=str(tmp_path))
    assert "pass offload_buffers=True" in caplog.text
    wanted = _load(checkpoint)(IDS).logits
    assert torch.allclose(model(IDS.to(device)).logits.cpu(), wanted, atol=1e-3)


@pytest.mark.skipif(not V5, reason="transformers 4 looks for a Parameter of that name")
def test_an_offloaded_model_is_saved_whole(checkpoint: Path, tmp_path: Path) -> None:
    model = _load(
        checkpoint,
        device_map=_map(torch.device("cpu"), "disk"),
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=True,
    )
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    back = _load(tmp_path / "saved")
    assert torch.equal(back(IDS).logits, _load(checkpoint)(IDS).logits)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
