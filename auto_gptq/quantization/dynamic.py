"""Settings per module: patterns on names, in the form that GPTQModel and vLLM read.

``{"-:.*down_proj": {}, r"+:model\\.layers\\.0\\.": {"bits": 8}}``: a pattern is a regular
expression matched at the start of a module's full name; ``-:`` before it leaves matching modules
dense, ``+:`` or nothing overrides settings.  The first pattern that matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

OVERRIDABLE = ("bits", "group_size", "desc_act", "static_groups", "sym", "damp_percent")
SKIP, OVERRIDE = "-:", "+:"


def find_override(patterns: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """Give what a module's settings are overridden by, nothing being ``{}``; None to skip it."""
    pattern = find_pattern(patterns, name)
    if pattern is None:
        return {}
    return None if pattern.startswith(SKIP) else patterns[pattern]


def find_pattern(patterns: Mapping[str, Any], name: str) -> str | None:
    """Give the first pattern that matches a module's full name."""
    return next((p for p in patterns if re.match(_expression(p), name)), None)


def check_patterns(patterns: Any) -> None:
    """Look for what cannot work, except values, which the settings check themselves.

    :raises ConfigError: naming the pattern
    """
    if not isinstance(patterns, Mapping):
        raise ConfigError(
            f"dynamic is a {type(patterns).__name__}; it must be a dict from patterns on module "
            'names to settings, like {r"+:.*\\.down_proj": {"bits": 8}, r"-:.*\\.0\\..*": {}}.'
        )
    for pattern, override in patterns.items():
        if not isinstance(pattern, str) or not isinstance(override, Mapping):
            raise ConfigError(
                f"dynamic[{pattern!r}] is {override!r}; patterns must be strings and what they "
                "stand for dicts of settings, {} to change none."
            )
        try:
            re.compile(_expression(pattern))
        except re.error as error:
            raise ConfigError(
                f"dynamic[{pattern!r}] is not a regular expression ({error}). A dot before a name "
                r'is written "\.", any text ".*".'
            ) from None
        unknown = sorted(set(override) - set(OVERRIDABLE))
        if unknown:
            raise ConfigError(
                f"dynamic[{pattern!r}] sets {', '.join(map(str, unknown))}; what can differ "
                f"between modules is {', '.join(OVERRIDABLE)}."
            )
        if override and pattern.startswith(SKIP):
            raise ConfigError(
                f"dynamic[{pattern!r}] leaves modules dense ({SKIP}), so it cannot set "
                f"{', '.join(override)} as well; give it {{}}, or begin it with {OVERRIDE}"
            )


def known_settings_only(patterns: Any) -> Any:
    """Drop what other tools note per module and no reader needs (``mse``, say)."""
    if not isinstance(patterns, Mapping):
        return patterns
    return {
        pattern: {k: v for k, v in override.items() if k in OVERRIDABLE}
        if isinstance(override, Mapping) and not str(pattern).startswith(SKIP)
        else {}
        for pattern, override in patterns.items()
    }


def _expression(pattern: str) -> str:
    return pattern[len(SKIP) :] if pattern.startswith((SKIP, OVERRIDE)) else pattern
