"""From a saved folder to a repository on the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, QuantizedStateError
from ..quantization.config import BaseQuantizeConfig
from .card import MARK, CardFacts, model_card

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

    from ._base import BaseGPTQForCausalLM

logger = logging.getLogger(__name__)

_CARD = "README.md"


def push_to_hub(
    wrapper: BaseGPTQForCausalLM,
    repo_id: str,
    save_dir: str | Path | None = None,
    use_safetensors: bool = True,
    safetensors_metadata: dict[str, Any] | None = None,
    commit_message: str = "Upload of AutoGPTQ quantized model",
    use_auth_token: bool | str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload the files of a saved model, with a model card, as one commit.

    A ``README.md`` in the folder is uploaded as it is; one in the repository stays, unless an
    earlier push wrote it.

    :param save_dir: save the model there first; None to upload what was saved or loaded last
    :param use_auth_token: older name of ``token``
    :raises ConfigError: (a ValueError) if there is nothing saved to upload
    :raises QuantizedStateError: (an EnvironmentError) if the model is not quantized
    """
    from huggingface_hub import HfApi

    if not wrapper.quantized:
        raise QuantizedStateError("The model is not quantized yet; call quantize() first.")
    if save_dir is not None:
        wrapper.save_quantized(save_dir, use_safetensors, safetensors_metadata)
    folder = _saved_folder(wrapper, save_dir)
    api = HfApi(token=use_auth_token if token is None else token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    operations = _files_of(folder) + _card(wrapper, repo_id, folder, api)
    logger.info("Uploading %d files from %s to %s.", len(operations), folder, repo_id)
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, create_pr=create_pr
    )


def _saved_folder(wrapper: BaseGPTQForCausalLM, save_dir: str | Path | None) -> Path:
    last = save_dir if save_dir is not None else wrapper.quantize_config.model_name_or_path
    if last is None:
        raise ConfigError(
            "The quantized model has not been saved yet, so there is nothing to upload; "
            "call save_quantized(folder) first, or pass save_dir=."
        )
    if not Path(last).is_dir():
        raise ConfigError(f"{last} is not a folder on this machine; pass save_dir= to make one.")
    return Path(last)


def _files_of(folder: Path) -> list[CommitOperationAdd]:
    """Give the files of a folder that are not hidden; subfolders are not a checkpoint's."""
    from huggingface_hub import CommitOperationAdd

    return [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]


def _card(
    wrapper: BaseGPTQForCausalLM, repo_id: str, folder: Path, api: HfApi
) -> list[CommitOperationAdd]:
    """Give the card to add: none where the user has one."""
    from huggingface_hub import CommitOperationAdd

    if (folder / _CARD).exists():
        return []
    if api.file_exists(repo_id, _CARD):
        present = Path(api.hf_hub_download(repo_id, _CARD)).read_text(encoding="utf-8")
        if MARK not in present:
            return []
    facts = CardFacts(
        repo_id,
        base_model=_base_model(wrapper),
        calibration_rows=wrapper.calibration_rows,
        calibration_tokens=max((entry.tokens for entry in wrapper.report), default=0),
        perplexity=wrapper.perplexity,
    )
    # As written in the folder, which is what gets uploaded.
    card = model_card(BaseQuantizeConfig.from_pretrained(folder), facts)
    return [CommitOperationAdd(path_in_repo=_CARD, path_or_fileobj=card.encode())]


def _base_model(wrapper: BaseGPTQForCausalLM) -> str | None:
    """Give the Hub id of what was quantized; a path of this machine would help nobody."""
    name = str(getattr(wrapper.config, "_name_or_path", "") or "")
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name
    return name if wrapper.report and is_id and not Path(name).exists() else None
