"""Carry along the code of a model that brings its own (``trust_remote_code``).

Its configurations name classes in ``auto_map``: ``"modeling_x.XForCausalLM"``, or with a repository
before it, ``"org/name--modeling_x.XForCausalLM"``, as transformers puts there for one from the Hub.
A saved checkpoint must not lean on the place that it came from, so code is copied and found there.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from .carry import Source

logger = logging.getLogger(__name__)

_NAMING = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_IMPORTS = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


def carry_code(source: Source, folder: Path) -> set[str]:
    """Copy the files with a model's code into a folder, and give their names without ``.py``.

    A failure is only logged: it must not cost the user a model that took hours to quantize.
    """
    carried: set[str] = set()
    try:
        waiting = list(dict.fromkeys(_named_modules(source)))
        while waiting:
            module = waiting.pop()
            path = source.find(f"{module}.py")
            if path is None:
                logger.warning("%s names code in %s.py, but has no such file.", source.name, module)
                continue
            shutil.copyfile(path, folder / path.name)
            carried.add(module)
            imports = _IMPORTS.findall(path.read_text(encoding="utf-8"))
            named = {first or second for first, second in imports}
            waiting += sorted(named - carried - set(waiting))
    except OSError as error:
        logger.warning("The code of %s was not copied: %s", source.name, error)
    return carried


def found_beside(auto_map: dict[str, Any], modules: Container[str]) -> dict[str, Any]:
    """Give an ``auto_map`` that no longer leads to a repository for code that was carried along."""

    def local(reference: Any) -> Any:
        if isinstance(reference, (list, tuple)):
            return [local(each) for each in reference]
        _, _, name = str(reference).rpartition("--")
        return name if name.partition(".")[0] in modules else reference

    return {kind: local(reference) for kind, reference in auto_map.items()}


def _named_modules(source: Source) -> Iterator[str]:
    """Give the modules of the model's own repository that its configurations name."""
    for file in _NAMING:
        path = source.find(file)
        if path is None:
            continue
        try:
            auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
        except ValueError:  # whoever reads it will say so
            continue
        for reference in _flat(auto_map.values() if isinstance(auto_map, dict) else auto_map):
            repository, _, name = reference.rpartition("--")
            if repository in ("", str(source.name)):
                yield name.partition(".")[0]


def _flat(references: Iterable[Any]) -> Iterator[str]:
    for reference in references:
        if isinstance(reference, str):
            yield reference
        elif reference is not None:
            yield from _flat(reference)
