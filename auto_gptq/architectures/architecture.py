"""One row of the architecture table."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """Where the decoder blocks of a model lie and in what order their linears are solved.

    :param block_classes: model type (as in ``config.json``) → class name of a decoder block
    :param blocks: dotted name of the list of decoder blocks
    :param around: dotted names of what runs before and after the blocks
    :param steps: names of the linears solved together, relative to a block, one string per step,
        in the order in which they run; ``*`` stands for the numbers of experts; a name that a block
        lacks is passed over
    :param head: dotted name of the output layer, which stays dense
    """

    block_classes: Mapping[str, str | None]
    blocks: str
    around: tuple[str, ...]
    steps: tuple[str, ...]
    head: str = "lm_head"

    def step_names(self, true_sequential: bool = True) -> list[list[str]]:
        """Give the names of each step; one merged step if not ``true_sequential``."""
        steps = [step.split() for step in self.steps]
        return steps if true_sequential else [[name for step in steps for name in step]]

    def linear_names(self) -> list[str]:
        """Give the names of all linears that are quantized, relative to a block."""
        return [name for step in self.step_names() for name in step]

    def steps_of(self, linears: Collection[str], true_sequential: bool = True) -> list[list[str]]:
        """Give the steps of a block that has the linears of these names, ``*`` written out."""
        steps: list[list[str]] = []
        seen: set[str] = set()
        for step in self.step_names(true_sequential):
            found = dict.fromkeys(name for part in step for name in matching(part, linears))
            names = [name for name in found if name not in seen]
            seen.update(names)
            if names:
                steps.append(names)
        return steps

    def as_class_attributes(self, model_type: str) -> dict[str, Any]:
        """Give the attributes by which AutoGPTQ's classes say the same for one model type."""
        return {
            "layer_type": self.block_classes[model_type],
            "layers_block_name": self.blocks,
            "outside_layer_modules": list(self.around),
            "inside_layer_modules": self.step_names(),
            "lm_head_name": self.head,
        }

    @classmethod
    def from_class_attributes(cls, owner: object, model_type: str) -> Architecture:
        """Read the row that a class, or an instance, in AutoGPTQ's style describes.

        :raises ConfigError: (a ValueError) if it does not say where its blocks or linears are
        """
        blocks = getattr(owner, "layers_block_name", None)
        steps = getattr(owner, "inside_layer_modules", None)
        if not blocks or not steps:
            raise ConfigError(
                f"A class for {model_type!r} must set both layers_block_name (it is {blocks!r}) "
                f"and inside_layer_modules (it is {steps!r}), a list of lists of names in a block."
            )
        return cls(
            block_classes={model_type: getattr(owner, "layer_type", None)},
            blocks=blocks,
            around=tuple(getattr(owner, "outside_layer_modules", None) or ()),
            steps=tuple(" ".join(step) for step in steps),
            head=getattr(owner, "lm_head_name", None) or "lm_head",
        )


def matching(pattern: str, names: Collection[str]) -> Sequence[str]:
    """Give the names that a name with ``*`` for numbers stands for, in their order."""
    if "*" not in pattern:
        return [pattern] if pattern in names else []
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if expression.fullmatch(name)]
