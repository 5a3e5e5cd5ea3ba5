"""Events of a run → one bar on the terminal."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

from .report import ModuleReport


class Progress:
    """A bar over modules that shows the last one and its error; silent where none is watching.

    :param total: number of modules to quantize
    :param shown: False for no bar, None for one only on a terminal
    """

    def __init__(self, total: int, shown: bool | None = None) -> None:
        self._bar = tqdm(
            total=total,
            desc="quantizing",
            unit="module",
            disable=None if shown is None else not shown,
            dynamic_ncols=True,
        )

    def module_done(self, entry: ModuleReport) -> None:
        """Advance by one module."""
        self._bar.set_postfix_str(f"{entry.name}, error {entry.error:.2%}", refresh=False)
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
