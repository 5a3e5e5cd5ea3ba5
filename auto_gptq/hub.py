"""From a local folder or a Hub repository to files on disk: the only client of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import MissingFileError

# What callers may pass on to the Hub.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keep those of the keyword arguments that concern the Hub.

    Of AutoGPTQ's, ``use_auth_token`` is an older name of ``token``; ``resume_download``,
    ``proxies`` and ``_commit_hash`` mean nothing to today's client.
    """
    wanted = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    if kwargs.get("use_auth_token") is not None:
        wanted.setdefault("token", kwargs["use_auth_token"])
    return wanted


def find_file(source: str | Path, name: str, **kwargs: Any) -> Path | None:
    """Give the local path of a file of a folder or Hub repository, or None if it has none.

    :param source: a folder, or a Hub id
    :param name: file name, relative to the folder and its ``subfolder``
    :raises MissingFileError: if the repository is unknown, or neither reachable nor in the cache
    """
    wanted = hub_arguments(kwargs)
    subfolder = wanted.pop("subfolder", "")
    folder = Path(source)
    if folder.is_dir():
        path = folder / subfolder / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **wanted))
    except LocalEntryNotFoundError as error:
        if _is_cached(str(source), subfolder, wanted):
            return None
        raise MissingFileError(
            f"{source} is not a folder, and of that name nothing is in the Hub's cache, while the "
            f"Hub was not asked or did not answer ({type(error.__cause__).__name__}). "
            "Check the path, the network, HF_HUB_OFFLINE and local_files_only."
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise MissingFileError(f"{source} is neither a folder nor the id of a model.") from error
    except RevisionNotFoundError as error:
        raise MissingFileError(
            f"The repository {source} has no revision {wanted.get('revision')!r}."
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{source} is not a folder, and the Hub shows no repository of that name. "
            "If it is private or gated, pass token=."
        ) from error


def _is_cached(repo_id: str, subfolder: str, wanted: dict[str, Any]) -> bool:
    """Tell whether this revision was downloaded before; every model has a ``config.json``."""
    from huggingface_hub import try_to_load_from_cache

    where = {name: wanted[name] for name in ("cache_dir", "revision") if name in wanted}
    name = f"{subfolder}/config.json" if subfolder else "config.json"
    return isinstance(try_to_load_from_cache(repo_id, name, **where), str)


def assets_folder(source: str | Path) -> Path:
    """Give a folder for files made from a model: its own, or one in the Hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import cached_assets_path

    namespace, _, name = str(source).rpartition("/")
    return cached_assets_path("auto_gptq", namespace=namespace or "default", subfolder=name)
