"""The rules of the house that a program can check: who may import whom, who prints, how long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A folder or module may import those before it, and itself.
ORDER = [
    "_version",
    "errors",
    "optional",
    "hub",
    "architectures",
    "formats",
    "kernels",
    "quantization",
    "nn_modules",
    "checkpoint",
    "calibration",
    "pipeline",
    "generation",
    "modeling",
    "integrations",
    "evaluation",
    "cli",
    "__main__",
]
EXEMPT = ("__init__", "_old_names")  # at the top: they name modules of every layer, by string
OPEN_TO_ALL = ("_old_names",)
NO_TORCH = ("errors", "architectures")
MAY_PRINT = ("auto_gptq/pipeline/progress.py", "auto_gptq/cli.py")
MAY_INCLUDE_TORCH = re.compile(r"csrc/bindings[a-z_]*\.(cpp|h)")
LONGEST_PYTHON, LONGEST_NATIVE = 400, 500


def python_files(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Give name, layer and syntax tree of every Python file of the package."""
    for path in sorted((root / "auto_gptq").rglob("*.py")):
        name = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        yield name.as_posix(), Path(name.parts[1]).stem, tree


def native_files(root: Path) -> Iterator[tuple[str, str]]:
    """Give name and text of every C++ and CUDA file."""
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".hpp"):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Give line and full dotted name of everything imported, inside functions too."""
    package = Path(name).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def check_direction(root: Path) -> Iterator[str]:
    """Give a line for each import that points the wrong way."""
    for name, layer, tree in python_files(root):
        if layer in EXEMPT:
            continue
        if layer not in ORDER:
            yield f"{name}: {layer} has no place in ORDER of tests/test_layers.py; give it one"
            continue
        for line, target in imports(name, tree):
            top, _, rest = target.partition(".")
            imported = rest.partition(".")[0]
            if top != "auto_gptq" or imported in OPEN_TO_ALL:
                continue
            if imported not in ORDER:
                what = f"the front door ({target}); import from the module that defines it"
                yield f"{name}:{line}: {layer} may not import {what}"
            elif ORDER.index(imported) > ORDER.index(layer):
                yield f"{name}:{line}: {layer} may not import {imported}"


def check_torch_free(root: Path) -> Iterator[str]:
    """Give a line for each import of torch in a layer that must do without."""
    for name, layer, tree in python_files(root):
        if layer in NO_TORCH:
            for line, target in imports(name, tree):
                if target.partition(".")[0] == "torch":
                    yield f"{name}:{line}: {layer} may not import torch"


def check_prints(root: Path) -> Iterator[str]:
    """Give a line for each call of print outside the two files that talk to people."""
    for name, _, tree in python_files(root):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
                and name not in MAY_PRINT
            ):
                yield f"{name}:{node.lineno}: only {' and '.join(MAY_PRINT)} may print; log it"


def check_includes(root: Path) -> Iterator[str]:
    """Give a line for each include of torch outside the bindings."""
    torch_header = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)/', re.MULTILINE)
    for name, text in native_files(root):
        if not MAY_INCLUDE_TORCH.fullmatch(name):
            for found in torch_header.finditer(text):
                line = text.count("\n", 0, found.start(1)) + 1
                yield f"{name}:{line}: only csrc/bindings* may include torch"


def check_lengths(root: Path) -> Iterator[str]:
    """Give a line for each file that has grown too long to read in one go."""
    files = [(name, (root / name).read_text(encoding="utf-8")) for name, _, _ in python_files(root)]
    for name, text in [*files, *native_files(root)]:
        most = LONGEST_PYTHON if name.endswith(".py") else LONGEST_NATIVE
        lines = len(text.splitlines())
        if lines > most:
            yield f"{name}: {lines} lines, {most} at most; split it by what it does"


CHECKS = [check_direction, check_torch_free, check_prints, check_includes, check_lengths]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_the_rule(check) -> None:
    assert list(check(ROOT)) == []


BROKEN = {
    "import in a function": (
        check_direction,
        "auto_gptq/formats/gptq.py",
        "def f():\n    from ..kernels import ops\n",
        "auto_gptq/formats/gptq.py:2: formats may not import kernels",
    ),
    "relative import of a folder by name": (
        check_direction,
        "auto_gptq/nn_modules/qlinear/linear.py",
        "from ... import modeling\n",
        "auto_gptq/nn_modules/qlinear/linear.py:1: nn_modules may not import modeling",
    ),
    "absolute import": (
        check_direction,
        "auto_gptq/hub.py",
        "import auto_gptq.cli\n",
        "auto_gptq/hub.py:1: hub may not import cli",
    ),
    "import in a folder's own __init__": (
        check_direction,
        "auto_gptq/kernels/__init__.py",
        "from ..pipeline.block import run\n",
        "auto_gptq/kernels/__init__.py:1: kernels may not import pipeline",
    ),
    "import through the front door": (
        check_direction,
        "auto_gptq/pipeline/block.py",
        "from auto_gptq import AutoGPTQForCausalLM\n",
        "auto_gptq/pipeline/block.py:1: pipeline may not import the front door",
    ),
    "folder without a place": (
        check_direction,
        "auto_gptq/utils/misc.py",
        "",
        "auto_gptq/utils/misc.py: utils has no place in ORDER",
    ),
    "torch in architectures": (
        check_torch_free,
        "auto_gptq/architectures/table.py",
        "def f():\n    from torch.nn import Linear\n",
        "auto_gptq/architectures/table.py:2: architectures may not import torch",
    ),
    "print in a library module": (
        check_prints,
        "auto_gptq/modeling/save.py",
        "x = 1\nprint(x)\n",
        "auto_gptq/modeling/save.py:2: only",
    ),
    "torch in a kernel": (
        check_includes,
        "csrc/cuda/gemv.cu",
        "#include <cstdint>\n#include <torch/csrc/stable/library.h>\n",
        "csrc/cuda/gemv.cu:2: only csrc/bindings",
    ),
    "long Python file": (
        check_lengths,
        "auto_gptq/cli.py",
        "x = 1\n" * 401,
        "auto_gptq/cli.py: 401 lines",
    ),
    "long native file": (
        check_lengths,
        "csrc/cpu/gemm.cpp",
        "//\n" * 501,
        "csrc/cpu/gemm.cpp: 501 lines",
    ),
}


@pytest.mark.parametrize(("check", "name", "text", "complaint"), BROKEN.values(), ids=BROKEN)
def test_the_checker_sees_a_broken_rule(tmp_path: Path, check, name, text, complaint) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text)
    (found,) = check(tmp_path)
    assert found.startswith(complaint)


ALLOWED = {
    "a layer above": ("auto_gptq/kernels/ops.py", "from ..formats.gptq import Packed\n"),
    "its own folder": ("auto_gptq/formats/gptq.py", "from . import packing\nfrom .grid import x\n"),
    "the version": ("auto_gptq/checkpoint/writer.py", "from .._version import __version__\n"),
    "evaluation over calibration": ("auto_gptq/evaluation/tasks.py", "from ..calibration import x"),
    "the package's own front door": ("auto_gptq/__init__.py", "from .cli import main\n"),
    "the table of old names": ("auto_gptq/_old_names.py", "from .cli import main\n"),
    "a library of a similar name": ("auto_gptq/hub.py", "import auto_gptq_extras.cli\n"),
    "a progress line": ("auto_gptq/pipeline/progress.py", "print('done')\n"),
    "torch in the bindings": ("csrc/bindings.cpp", "#include <torch/csrc/stable/library.h>\n"),
    "a file of just the allowed length": ("auto_gptq/cli.py", "x = 1\n" * 400),
}


@pytest.mark.parametrize(("name", "text"), ALLOWED.values(), ids=ALLOWED)
def test_the_checker_lets_pass(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text)
    assert [line for check in CHECKS for line in check(tmp_path)] == []
