"""Let transformers load, make and save GPTQ models with this package: ``enable`` and ``disable``.

transformers looks up who handles ``quant_method: "gptq"`` in two dicts of
``transformers.quantizers.auto``. :func:`enable` puts our two classes there, :func:`disable` puts
back what was there. ``import auto_gptq`` calls :func:`enable` once. Where transformers has not been
loaded yet, a finder waits for that one module, so that nobody pays for what is not used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_MODULE = "transformers.quantizers.auto"
_METHOD = "gptq"
# What transformers' own classes run on, and since which version they no longer want AutoGPTQ.
_RIVALS = {"gptqmodel": (7, 0), "optimum": (2, 1)}


def enable(*, even_beside_gptqmodel: bool = True) -> bool:
    """Let transformers use this package for GPTQ, now or as soon as it is loaded.

    :param even_beside_gptqmodel: False to leave the place to gptqmodel and optimum where both are
        installed, as ``import auto_gptq`` does
    :returns: whether it will
    """
    if not even_beside_gptqmodel and _rivals_are_installed():
        logger.info(
            "gptqmodel and optimum are installed: transformers keeps using them for GPTQ. To use "
            "auto_gptq instead: auto_gptq.integrations.transformers.enable()."
        )
        return False
    loaded = sys.modules.get(_MODULE)
    if loaded is None:
        _Waiting.install()
    elif hasattr(loaded, "AUTO_QUANTIZATION_CONFIG_MAPPING"):  # not in the midst of being loaded
        _put_ours(loaded)
    return True


def disable() -> None:
    """Give GPTQ back to what transformers itself would use; loaded models keep working."""
    _Waiting.remove()
    loaded = sys.modules.get(_MODULE)
    for table, former in _former.items():
        getattr(loaded, table)[_METHOD] = former
    _former.clear()


def is_enabled() -> bool:
    """Tell whether transformers uses this package for GPTQ, or will once it is loaded."""
    return bool(_former) or any(isinstance(finder, _Waiting) for finder in sys.meta_path)


# Name of transformers' dict → the class that was there before ours.
_former: dict[str, Any] = {}


def _put_ours(auto: ModuleType) -> None:
    if _former:
        return
    from .hf_quantizer import AutoGPTQHfQuantizer, GPTQConfig

    ours = {
        "AUTO_QUANTIZER_MAPPING": AutoGPTQHfQuantizer,
        "AUTO_QUANTIZATION_CONFIG_MAPPING": GPTQConfig,
    }
    for table, kind in ours.items():
        _former[table] = getattr(auto, table)[_METHOD]
        getattr(auto, table)[_METHOD] = kind


def _rivals_are_installed() -> bool:
    for name, least in _RIVALS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < least:
            return False
    return True


class _Waiting(MetaPathFinder):
    """Stands on ``sys.meta_path`` until transformers' module is asked for, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        self.remove()
        spec = importlib.util.find_spec(fullname)  # what the other finders say
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenOurs(spec.loader)
        return spec

    @classmethod
    def install(cls) -> None:
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    @classmethod
    def remove(cls) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, cls)]


class _ThenOurs(Loader):
    """Runs a module's own loader, then puts our classes there."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # nothing of this remains
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _put_ours(module)
