"""Named choices of settings, measured in docs/guides/choosing-settings.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A set of settings, to which bits, group size and the like are added."""

    meant_for: str
    settings: dict[str, Any]


_OURS = {
    "desc_act": True,
    "static_groups": True,  # so that g_idx is trivial and every server takes it
    "scale_search": True,
    "signed_scales": True,
    "correction": 0.75,
    "damp_percent": 0.03,
}

PRESETS = {
    "compatible": Preset(
        "AutoGPTQ's integers",
        {"desc_act": True, "static_groups": False, "scale_search": False},
    ),
    "default": Preset("much better at about the same time", _OURS),
    "best": Preset("the most accurate, at several times the time", _OURS | {"tuning_epochs": 3}),
}
