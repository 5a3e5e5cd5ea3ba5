"""Run every Python block of README.md and docs/, so that what people copy works.

The blocks of one file run in order and share their names. A block right after the comment
``<!-- no-run: reason -->`` is only compiled.
"""

from __future__ import annotations

import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]
OPENING = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})\s*(?P<language>\w*)")
NO_RUN = re.compile(r"<!--\s*no-run:\s*\S.*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its code, the line it starts on (from 1), and whether to run it."""

    code: str
    line: int
    runs: bool


def python_blocks(text: str) -> Iterator[Block]:
    """Give the Python blocks of a Markdown text."""
    lines = text.splitlines()
    before, number = "", 0  # the last line that was not empty
    while number < len(lines):
        opening = OPENING.match(lines[number])
        number += 1
        if not opening:
            before = lines[number - 1].strip() or before
            continue
        start = number
        while number < len(lines) and lines[number].strip() != opening["fence"]:
            number += 1
        if opening["language"].lower() in ("python", "py", "python3"):
            code = textwrap.dedent("\n".join(lines[start:number])) + "\n"
            yield Block(code, start + 1, runs=not NO_RUN.fullmatch(before))
        before, number = "", number + 1


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page; errors point to the lines of the page itself."""
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses and pickle look there
    for block in python_blocks(page.read_text(encoding="utf-8")):
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.runs:
            exec(code, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_block_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch)


PAGE = """
# A page
```python
x = 1
```

<!-- no-run: needs a GPU -->

```python
x = broken_name
```

```sh
exit 1
```

- in a list

  ```python
  assert x == 1
  x = 2
  ```
"""


def test_blocks_are_found_with_their_lines_and_marks() -> None:
    found = list(python_blocks(PAGE))
    assert [(block.line, block.runs) for block in found] == [(4, True), (10, False), (20, True)]
    assert found[2].code == "assert x == 1\nx = 2\n"


def test_blocks_share_names_and_errors_name_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    run_page(page, monkeypatch)
    page.write_text(PAGE + "\n```python\nassert x == 2\nassert x == 3\n```\n")
    with pytest.raises(AssertionError) as failure:
        run_page(page, monkeypatch)
    assert failure.traceback[-1].lineno + 1 == len(PAGE.splitlines()) + 4


def test_a_block_that_is_not_run_must_still_be_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: slow -->\n```python\nx = = 1\n```\n")
    with pytest.raises(SyntaxError):
        run_page(page, monkeypatch)
