"""Libraries that only some features need: import them when touched, and say how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingLibraryError

# Name of the library -> what to install. An extra pins versions that work.
_INSTALL = {
    "datasets": "datasets",
    "gguf": "auto-gptq[gguf]",
    "peft": "auto-gptq[peft]",
}


def require(library: str, feature: str) -> Any:
    """Import a library, or one of its modules by dotted name.

    :param feature: what needs it, for the message
    :raises MissingLibraryError: (an ImportError) naming the extra to install
    """
    name = library.partition(".")[0]
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingLibraryError(
            f"{feature} needs {name}, which cannot be imported ({error}): "
            f"pip install {_INSTALL[name]!r}"
        ) from error
