"""One row of the architecture table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Where the decoder blocks of a model lie and in what order their linears are solved.

    :param block_classes: model type (as in ``config.json``) → class name of a decoder block
    :param blocks: dotted name of the list of decoder blocks
    :param around: dotted names of what runs before and after the blocks
    :param steps: names of the linears solved together, relative to a block, one string per step,
        in the order in which they run; a name that a block lacks is passed over
    :param head: dotted name of the output layer, which stays dense
    """

    block_classes: Mapping[str, str]
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
