"""How many calibration tokens a router sent to each expert, and which experts starved."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ..nn_modules.experts import expert_groups
from ..nn_modules.unfused import routed_tokens
from .report import ModuleReport

logger = logging.getLogger(__name__)

# An expert that gets less than this share of the tokens of even routing starves.
_LEAST_SHARE = 0.25
_MOST_SHOWN = 8


def with_routed_tokens(
    entries: Iterable[ModuleReport], name: str, block: nn.Module, expert_share: float
) -> list[ModuleReport]:
    """Give a block's entries with the tokens routed to each expert, and warn of those that starved.

    To be called before the experts' linears are packed.
    """
    routed: dict[str, int] = {}
    for module_name, linears in expert_groups(block).items():
        tokens = routed_tokens(block.get_submodule(module_name))
        if tokens is None:
            continue
        per_expert = len(linears) // len(tokens)
        routed |= {f"{name}.{linear}": tokens[i // per_expert] for i, linear in enumerate(linears)}
        _warn_of_starved(f"{name}.{module_name}", tokens, expert_share)
    return [replace(entry, routed=routed.get(entry.name)) for entry in entries]


def _warn_of_starved(name: str, tokens: list[int], expert_share: float) -> None:
    fair = sum(tokens) / len(tokens)
    starved = {i: count for i, count in enumerate(tokens) if count < _LEAST_SHARE * fair}
    if not starved:
        return
    shown = ", ".join(f"{i} ({count})" for i, count in list(starved.items())[:_MOST_SHOWN])
    more = f" and {len(starved) - _MOST_SHOWN} more" if len(starved) > _MOST_SHOWN else ""
    done = (
        "they were solved on tokens of other experts as well"
        if expert_share
        else "those without any were rounded"
    )
    logger.warning(
        "%s: of %d experts %d got less than %.0f of the %d tokens routed there: %s%s; %s. Use more "
        "or more varied examples, or a larger expert_share.",
        name,
        len(tokens),
        len(starved),
        _LEAST_SHARE * fair,
        sum(tokens),
        shown,
        more,
        done,
    )
