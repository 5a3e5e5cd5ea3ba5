"""Push a quantized model to a Hub and load it back, with the real client talking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.errors import ConfigError, MissingFileError, QuantizedStateError
from auto_gptq.modeling import BaseGPTQForCausalLM
from tests.integrations.hub_server import TOKEN, Hub, running_hub
from tests.tiny import tiny_examples, tiny_model

WEIGHTS = "gptq_model-4bit-32g.safetensors"
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub and point huggingface_hub at it; tests are offline otherwise."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the older way, by Git LFS
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
        getattr(huggingface_hub, "close_session", lambda: None)()  # from huggingface_hub 1.0 on


@pytest.fixture(scope="module")
def wrapper() -> BaseGPTQForCausalLM:
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(bits=4, group_size=32))
    wrapper.quantize(tiny_examples())
    wrapper.model.float()
    return wrapper


def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def _pull(cache: Path, repo: str = "owner/tiny", **kwargs: Any) -> BaseGPTQForCausalLM:
    return AutoGPTQForCausalLM.from_quantized(repo, device="cpu", cache_dir=cache, **kwargs)


def _split(folder: Path) -> None:
    """Make two shards and an index of one file."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"-00001-of-00002": names[::2], "-00002-of-00002": names[1::2]}
    weight_map = {}
    for part, held in parts.items():
        file = WEIGHTS.replace(".safetensors", f"{part}.safetensors")
        save_file({name: tensors[name] for name in held}, folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    for name in (f"{WEIGHTS}.index.json", "model.safetensors.index.json"):
        (folder / name).write_text(index)
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_a_pushed_model_comes_back_with_equal_logits(
    hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path, sharded: bool
) -> None:
    folder = tmp_path / "saved"
    wrapper.save_quantized(folder)
    if sharded:
        _split(folder)
    (folder / ".hidden").write_text("not for the Hub")
    commit = wrapper.push_to_hub("owner/tiny", token=TOKEN)
    repository = hub.repositories["owner/tiny"]
    assert commit.oid == repository.branches["main"]
    assert repository.messages[-1] == "Upload of AutoGPTQ quantized model"
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert set(repository.files()) == visible | {"README.md", ".gitattributes"}
    loaded = _pull(tmp_path / "cache")
    # The pushed model's activations are fp32 as well, and its packed tensors the same.
    assert torch.equal(_logits(loaded), _logits(wrapper))
    assert len(hub.blobs) == (2 if sharded else 1)


def test_saving_while_pushing_a_private_model(
    hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path
) -> None:
    wrapper.push_to_hub(
        "owner/secret",
        tmp_path / "new",
        safetensors_metadata={"note": "mine"},
        commit_message="First",
        private=True,
        use_auth_token=TOKEN,
    )
    assert (tmp_path / "new" / WEIGHTS).is_file()
    assert not (tmp_path / "new" / "README.md").exists()
    assert hub.repositories["owner/secret"].private
    with pytest.raises(OSError, match=r"(?s)owner/secret.*private.*token"):
        _pull(tmp_path / "cache", "owner/secret")
    with pytest.raises(MissingFileError, match=r"owner/secret .* pass token="):
        BaseQuantizeConfig.from_pretrained("owner/secret", cache_dir=tmp_path / "cache")
    for spelling in ("token", "use_auth_token"):
        loaded = _pull(tmp_path / spelling, "owner/secret", **{spelling: TOKEN})
        assert torch.equal(_logits(loaded), _logits(wrapper))


def test_a_revision_a_pull_request_and_a_subfolder(
    hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path
) -> None:
    wrapper.save_quantized(tmp_path / "saved")
    first = wrapper.push_to_hub("owner/tiny", token=TOKEN, create_pr=True)
    assert first.pr_url == f"{hub.url}/owner/tiny/discussions/1"
    repository = hub.repositories["owner/tiny"]
    assert WEIGHTS not in repository.files("main")
    for revision in ("refs/pr/1", first.oid):
        loaded = _pull(tmp_path / "cache", revision=revision)
        assert torch.equal(_logits(loaded), _logits(wrapper))
    files = {f"deep/er/{name}": data for name, data in repository.files("refs/pr/1").items()}
    repository.commit("main", files, "A folder")
    loaded = _pull(tmp_path / "cache", subfolder="deep/er")
    assert torch.equal(_logits(loaded), _logits(wrapper))
    with pytest.raises(OSError, match="no-such-branch"):
        _pull(tmp_path / "cache", revision="no-such-branch")
    with pytest.raises(MissingFileError, match="no revision 'no-such-branch'"):
        BaseQuantizeConfig.from_pretrained("owner/tiny", revision="no-such-branch")


def test_what_is_not_there_is_named(hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(OSError, match="owner/unknown"):
        _pull(cache, "owner/unknown")
    with pytest.raises(MissingFileError, match=r"owner/unknown is not a folder.* no repository"):
        BaseQuantizeConfig.from_pretrained("owner/unknown", cache_dir=cache)
    with pytest.raises(MissingFileError, match="neither a folder nor the id of a model"):
        BaseQuantizeConfig.from_pretrained("./no/such/folder", cache_dir=cache)
    wrapper.push_to_hub("owner/tiny", tmp_path / "saved", token=TOKEN)
    files = hub.repositories["owner/tiny"].files()
    for name in (WEIGHTS, "model.safetensors.index.json"):
        del files[name]
    with pytest.raises(FileNotFoundError, match=rf"owner/tiny holds no weights .*{WEIGHTS}"):
        _pull(cache)
    for name in ("quantize_config.json", "config.json"):
        settings = json.loads(files.get("config.json", b"{}"))
        settings.pop("quantization_config", None)
        files[name] = json.dumps(settings).encode()
    del files["quantize_config.json"]
    with pytest.raises(MissingFileError, match="no quantization configuration"):
        BaseQuantizeConfig.from_pretrained("owner/tiny", cache_dir=tmp_path / "other")


def test_what_was_downloaded_is_found_without_the_hub(
    hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    wrapper.push_to_hub("owner/tiny", tmp_path / "saved", token=TOKEN)
    _pull(cache)
    asked = len(hub.requests)
    loaded = _pull(cache, local_files_only=True)
    assert torch.equal(_logits(loaded), _logits(wrapper))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(_logits(_pull(cache)), _logits(wrapper))
    assert len(hub.requests) == asked
    with pytest.raises(MissingFileError, match=r"nothing is in the Hub's cache.*OfflineMode"):
        BaseQuantizeConfig.from_pretrained("owner/other", cache_dir=cache)


def test_nothing_saved_or_quantized_means_nothing_to_push(wrapper: BaseGPTQForCausalLM) -> None:
    wrapper.quantize_config.model_name_or_path = None
    with pytest.raises(ValueError, match="has not been saved yet"):
        wrapper.push_to_hub("owner/tiny", token=TOKEN)
    wrapper.quantize_config.model_name_or_path = "someone/elses"
    with pytest.raises(ConfigError, match=r"someone/elses is not a folder.*save_dir="):
        wrapper.push_to_hub("owner/tiny", token=TOKEN)
    fresh = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig())
    with pytest.raises(QuantizedStateError, match="not quantized yet"):
        fresh.push_to_hub("owner/tiny", token=TOKEN)


def test_a_push_without_the_right_to_is_refused(
    hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="401"):
        wrapper.push_to_hub("owner/tiny", tmp_path / "saved", token="hf_wrong")
    assert not hub.repositories


def test_a_card_the_user_wrote_is_never_replaced(
    hub: Hub, wrapper: BaseGPTQForCausalLM, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    wrapper.push_to_hub("owner/tiny", folder, token=TOKEN)
    repository = hub.repositories["owner/tiny"]
    assert b"6 rows, 192 tokens" in repository.files()["README.md"]

    wrapper.perplexity["a text"] = 12.3456
    wrapper.push_to_hub("owner/tiny", token=TOKEN)
    assert b"| perplexity, a text | 12.346 |" in repository.files()["README.md"]  # ours: renewed

    repository.commit("main", {"README.md": b"# by hand, on the Hub"}, "")
    wrapper.push_to_hub("owner/tiny", token=TOKEN)
    assert repository.files()["README.md"] == b"# by hand, on the Hub"

    (folder / "README.md").write_text("# by hand, in the folder")
    wrapper.push_to_hub("owner/tiny", token=TOKEN)
    assert repository.files()["README.md"] == b"# by hand, in the folder"
    shutil.rmtree(folder)
