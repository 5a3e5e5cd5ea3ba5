"""Named choices of settings, measured in docs/guides/choosing-settings.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A set of settings, to which bits, group size and the like are added."""

    meant_for: str
    settings: dict[str, Any]


_IN_ORDER_OF_SIZE = {"desc_act": True, "static_groups": True}  # and g_idx trivial
_OURS = _IN_ORDER_OF_SIZE | {"scale_search": True, "signed_scales": True, "correction": 0.75}

PRESETS = {
    "compatible": Preset(
        "what AutoGPTQ did, integer for integer but for rounding",
        {"desc_act": True, "static_groups": False, "scale_search": False},
    ),
    "default": Preset("new code: much better at about the same time", _OURS),
}
