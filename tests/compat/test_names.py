"""What could be imported from AutoGPTQ 0.8 can be imported here, and is called alike."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from auto_gptq import _old_names

HERE = Path(__file__).parent
NAMES: dict[str, dict[str, str]] = json.loads((HERE / "autogptq_0_8_names.json").read_text())
SIGNATURES: dict[str, str] = json.loads((HERE / "autogptq_0_8_signatures.json").read_text())
KEPT = [(module, name) for module, row in NAMES.items() for name in row if row[name] == "kept"]


def resolve(path: str) -> Any:
    """Give what `module:Class.member` means."""
    module, _, names = path.partition(":")
    first, *rest = names.split(".")
    found = getattr(importlib.import_module(module), first)
    for name in rest:
        found = getattr(found, name)
    return found


def in_new_python(code: str) -> str:
    """Run code in a fresh interpreter and give what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_the_list_says_kept_or_dropped_with_a_reason() -> None:
    assert sum(map(len, NAMES.values())) >= 215
    for module, row in NAMES.items():
        for name, fate in row.items():
            assert fate == "kept" or len(fate.removeprefix("dropped: ")) > 15, (module, name)


@pytest.mark.parametrize("module, name", KEPT, ids=[f"{m}.{n}" for m, n in KEPT])
def test_a_kept_name_is_there(module: str, name: str) -> None:
    assert resolve(f"{module}:{name}") is not None or name == "MARLIN_EXCEPTION"
    namespace: dict[str, Any] = {}
    exec(f"from {module} import {name}", namespace)
    assert name in namespace


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_signature_is_autogptqs(path: str) -> None:
    """Ours may have more keyword-only parameters, and defaults where AutoGPTQ had none."""
    found = list(inspect.signature(resolve(path)).parameters.values())
    ours = [p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [part.partition("=") for part in SIGNATURES[path].split(", ")]
    positional = [(name, default) for name, _, default in wanted if not name.startswith("*")]
    assert [p.name for p in ours][: len(positional)] == [name for name, _ in positional]
    for parameter, (name, default) in zip(ours, positional, strict=False):
        if default:
            assert repr(parameter.default) == default, name
    for parameter in ours[len(positional) :]:
        assert parameter.default is not parameter.empty, f"{parameter.name} must not be required"
    if any(name.startswith("**") for name, _, _ in wanted):
        assert any(p.kind is p.VAR_KEYWORD for p in found)


def test_every_row_of_the_table_names_a_home_that_has_it() -> None:
    for module in _old_names.TABLE:
        full = f"auto_gptq.{module}".removesuffix(".")
        for name, (home, new) in _old_names.homes(full).items():
            assert hasattr(importlib.import_module(home, "auto_gptq"), new), (module, name)


def test_importing_prints_nothing_and_imports_no_heavy_library() -> None:
    code = """
import sys
import auto_gptq, auto_gptq.utils.peft_utils, auto_gptq.eval_tasks
from auto_gptq.utils import import_utils
from auto_gptq.modeling import llama
heavy = {"torch", "transformers", "accelerate", "datasets", "peft"} & set(sys.modules)
assert not heavy, heavy
"""
    assert in_new_python(code) == ""


STATEMENTS = {
    "a submodule first": "import auto_gptq.utils.peft_utils; auto_gptq.utils.peft_utils",
    "from a package": "from auto_gptq.nn_modules.qlinear import qlinear_cuda; "
    "qlinear_cuda.QuantLinear",
    "everything": "from auto_gptq.nn_modules.fused_llama_mlp import *; "
    "FusedLlamaMLPForQuantizedModel",
    "attributes all the way": "import auto_gptq; auto_gptq.modeling._base.SUPPORTED_MODELS.append; "
    "auto_gptq.utils.import_utils.TRITON_AVAILABLE",
    "find_spec": "import importlib.util as u; s = u.find_spec('auto_gptq.utils.data_utils'); "
    "assert s.name == 'auto_gptq.utils.data_utils' and s.loader",
    "a model class by its file": "from auto_gptq.modeling.decilm import DeciLMGPTQForCausalLM as a;"
    "from auto_gptq.modeling import DeciLMGPTQForCausalLM as b; assert a is b",
}


@pytest.mark.parametrize("code", STATEMENTS.values(), ids=STATEMENTS)
def test_an_old_path_is_imported_as_first_statement(code: str) -> None:
    assert in_new_python(code) == ""


def test_names_and_modules_that_never_were_are_missed_as_usual() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"auto_gptq\.utils\.nothing"):
        importlib.import_module("auto_gptq.utils.nothing")
    for module in ("auto_gptq", "auto_gptq.modeling", "auto_gptq.utils.import_utils"):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = importlib.import_module(module).nothing
    assert "dynamically_import_QuantLinear" in dir(
        importlib.import_module("auto_gptq.utils.import_utils")
    )


@pytest.mark.parametrize(
    "path",
    ["modeling.llama:LlamaGPTQForCausalLM", "nn_modules.qlinear.qlinear_cuda:QuantLinear"],
)
def test_a_pickle_with_an_old_path_finds_its_class(path: str) -> None:
    module, _, name = path.partition(":")
    found = pickle.loads(f"cauto_gptq.{module}\n{name}\n.".encode())
    assert found is resolve(f"auto_gptq.{path}")
    assert pickle.loads(pickle.dumps(found)) is found
