"""What a model came with goes along: the tokenizer's files and the settings for generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig, hub
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.modeling.carry import TOKENIZER_FILES
from tests.tiny import tiny_examples, tiny_model

# As in many published models: transformers refuses to save this, since nothing is sampled.
GENERATION = {"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9, "do_sample": False}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    tiny_model().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes(f"{name}\r\n".encode())
    (folder / "training_log.txt").write_text("not part of the model")
    return folder


def _quantize(source: str | Path, **kwargs: Any) -> BaseGPTQForCausalLM:
    config = BaseQuantizeConfig(bits=4, group_size=32)
    wrapper = AutoGPTQForCausalLM.from_pretrained(source, config, **kwargs)
    wrapper.quantize(tiny_examples())
    return wrapper


@pytest.mark.filterwarnings("ignore:.*generation flags.*")
def test_files_come_along_through_two_generations(dense: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _quantize(dense).save_quantized(first)
    AutoGPTQForCausalLM.from_quantized(first, device="cpu").save_quantized(second)
    for folder in (first, second):
        for name in TOKENIZER_FILES:
            assert (folder / name).read_bytes() == f"{name}\r\n".encode()
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {key: saved.get(key) for key in GENERATION} == GENERATION
        assert not (folder / "training_log.txt").exists()
    loaded = AutoGPTQForCausalLM.from_quantized(second, device="cpu")
    assert loaded.model.generation_config.eos_token_id == [7, 9]


def test_a_folder_saved_into_itself_keeps_its_files(dense: Path) -> None:
    _quantize(dense).save_quantized(dense)
    for name in TOKENIZER_FILES:
        assert (dense / name).read_bytes() == f"{name}\r\n".encode()


def test_a_hub_id_is_asked_with_the_arguments_of_loading(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = _quantize(dense, revision="abc", subfolder="")
    asked = []

    def find_file(source: Any, name: str, **kwargs: Any) -> Path | None:
        asked.append((source, name, kwargs))
        return dense / name if name == "merges.txt" else None

    monkeypatch.setattr(hub, "find_file", find_file)
    wrapper.save_quantized(tmp_path / "new")
    # Before that it looks for code of the model's own, in what names such code.
    assert [name for _, name, _ in asked][-len(TOKENIZER_FILES) :] == list(TOKENIZER_FILES)
    assert all((a[0], a[2]["revision"]) == (dense, "abc") for a in asked)
    assert (tmp_path / "new" / "merges.txt").is_file()


def test_a_tokenizer_that_cannot_be_had_costs_no_model(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrapper = _quantize(dense)

    def find_file(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(hub, "find_file", find_file)
    wrapper.save_quantized(tmp_path / "new")
    monkeypatch.undo()
    assert f"tokenizer of {dense} was not copied: the network is down" in caplog.text
    assert AutoGPTQForCausalLM.from_quantized(tmp_path / "new", device="cpu").quantized


def test_the_saved_configuration_is_read_by_old_and_new_and_names_no_path(
    dense: Path, tmp_path: Path
) -> None:
    wrapper = _quantize(dense, torch_dtype=torch.float16)
    wrapper.save_quantized(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert "rope_scaling" in config
    for file in (tmp_path / "new").glob("*.json"):
        if file.name not in TOKENIZER_FILES:
            assert str(tmp_path) not in file.read_text()


def test_where_autogptq_kept_converted_files(dense: Path, tmp_path: Path) -> None:
    config = BaseQuantizeConfig(model_name_or_path=str(dense))
    path = dense / "autogptq_model_gptq_marlin.safetensors"
    assert config.get_cache_file_path(checkpoint_format="marlin") == (str(path), False)
    path.touch()
    assert config.get_cache_file_path("gptq", "marlin") == (str(path), True)


@pytest.mark.parametrize("by", ["folder", "Hub"])
def test_code_is_found_beside_the_checkpoint_wherever_it_came_from(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers writes the repository before the names of a model's classes."""
    dense = tmp_path / "dense"
    tiny_model().save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    before = "" if by == "folder" else f"{dense}--"
    config["auto_map"] = {
        "AutoConfig": f"{before}configuration_own.OwnConfig",
        "AutoModel": "another/model--modeling_theirs.TheirModel",
        "AutoModelForCausalLM": f"{before}modeling_own.OwnModel",
    }
    (dense / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (dense / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (dense / "modeling_own.py").write_text("from .layers_own import Layer\nimport torch\n")
    for name in ("layers_own", "tokenization_own", "unrelated"):
        (dense / f"{name}.py").write_text("")
    with caplog.at_level("WARNING"):
        _quantize(dense).save_quantized(tmp_path / "new")
    found = {file.name for file in (tmp_path / "new").glob("*.py")}
    assert found == {"modeling_own.py", "layers_own.py", "tokenization_own.py"}
    assert "configuration_own.py, but has no such file" in caplog.text
    saved = json.loads((tmp_path / "new" / "config.json").read_text())["auto_map"]
    assert saved == config["auto_map"] | {"AutoModelForCausalLM": "modeling_own.OwnModel"}
