"""Events of a run → one bar on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from tqdm import tqdm

from .report import ModuleReport


class Progress:
    """A bar over blocks; silent where none is watching.

    It shows the last module and its error, tokens per second, memory in use and the time left.

    :param blocks: number of blocks to quantize
    :param tokens: calibration tokens that pass through each
    :param shown: False for no bar, None for one only on a terminal
    """

    def __init__(
        self, blocks: int, tokens: int, device: torch.device, shown: bool | None = None
    ) -> None:
        self._tokens = tokens
        self._device = device
        self._block_began = time.perf_counter()
        self._speed = ""
        self._bar = tqdm(
            total=blocks,
            desc="quantizing",
            unit="block",
            disable=None if shown is None else not shown,
            dynamic_ncols=True,
        )

    def module_done(self, entry: ModuleReport) -> None:
        """Show one module."""
        if self._bar.disable:
            return
        memory = _memory_in_use(self._device) / 1e9
        self._bar.set_postfix_str(
            f"{entry.name}, error {entry.error:.2%}{self._speed}, {memory:.1f} GB"
        )

    def block_done(self) -> None:
        """Advance by one block."""
        now = time.perf_counter()
        self._speed = f", {self._tokens / (now - self._block_began):,.0f} tokens/s"
        self._block_began = now
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
