"""Named choices of settings, measured in docs/guides/choosing-settings.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A set of settings, to which bits, group size and the like are added."""

    meant_for: str
    settings: dict[str, Any]
    at_8_bits: dict[str, Any] = field(default_factory=dict)  # what differs there

    def settings_at(self, bits: int) -> dict[str, Any]:
        """Give the settings for a number of bits."""
        return self.settings | (self.at_8_bits if bits == 8 else {})


_OURS = {
    "desc_act": True,
    "static_groups": True,  # so that g_idx is trivial and every server takes it
    "scale_search": True,
    "signed_scales": True,
    "correction": 0.75,
    "damp_percent": 0.03,
}

# 8 bits lose so little that the damping is what loses most.
_OURS_AT_8_BITS = {"damp_percent": 0.01}

PRESETS = {
    "compatible": Preset(
        "AutoGPTQ's integers",
        {"desc_act": True, "static_groups": False, "scale_search": False},
    ),
    "default": Preset("much better at about the same time", _OURS, _OURS_AT_8_BITS),
    "best": Preset(
        "the most accurate, at several times the time", _OURS | {"scale_epochs": 3}, _OURS_AT_8_BITS
    ),
}
