"""From a local folder or a Hub repository to files on disk: the only client of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What callers may pass on to the Hub; AutoGPTQ's spellings included.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "resume_download",
    "revision",
    "subfolder",
    "token",
    "use_auth_token",
    "_commit_hash",
)


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keep those of the keyword arguments that concern the Hub."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def find_file(source: str | Path, name: str, **kwargs: Any) -> Path | None:
    """Give the local path of a file of a folder or Hub repository, or None if it has none.

    :param source: a folder, or a Hub id
    :param name: file name, relative to the folder and its ``subfolder``
    :raises OSError: if the repository itself does not exist or cannot be reached
    """
    wanted = hub_arguments(kwargs)
    subfolder = wanted.pop("subfolder", "")
    folder = Path(source)
    if folder.is_dir():
        path = folder / subfolder / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    token = wanted.pop("use_auth_token", None)
    if token is not None:
        wanted.setdefault("token", token)
    for outdated in ("resume_download", "proxies", "_commit_hash"):
        wanted.pop(outdated, None)
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **wanted))
    except EntryNotFoundError:
        return None


def assets_folder(source: str | Path) -> Path:
    """Give a folder for files made from a model: its own, or one in the Hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import cached_assets_path

    namespace, _, name = str(source).rpartition("/")
    return cached_assets_path("auto_gptq", namespace=namespace or "default", subfolder=name)
