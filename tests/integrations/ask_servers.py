"""Ask vLLM's and SGLang's own code about checkpoints: ``ask_servers.py FOLDER ...`` prints JSON.

Their wheels must be importable: ``pip install --no-deps --target DIR vllm sglang``, 370 MB, and DIR
on PYTHONPATH. But neither needs a GPU, compiled parts or dependencies: the few modules that decide
are real, everything else they import is a stand-in, and the platform says it is an H100.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from safetensors import safe_open

_VLLM = "vllm.model_executor."
REAL = {
    "vllm.scalar_type",
    _VLLM + "layers.quantization.base_config",
    _VLLM + "layers.quantization.auto_gptq",
    _VLLM + "layers.quantization.utils.gptq_utils",
    _VLLM + "layers.quantization.utils.marlin_utils",
    _VLLM + "layers.quantization.utils.machete_utils",
    _VLLM + "kernels.linear.mixed_precision.MPLinearKernel",
    _VLLM + "kernels.linear.mixed_precision.machete",
    _VLLM + "kernels.linear.mixed_precision.marlin",
    "sglang.srt.layers.quantization.base_config",
    "sglang.srt.layers.quantization.utils",
    "sglang.srt.layers.quantization.marlin_utils",
    "sglang.srt.layers.quantization.gptq.gptq",
}
_ROOTS = ("vllm", "sglang")
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Anything(type):
    """A class whose every attribute is another such class, and that can be called and extended."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else cls  # it may be a decorator


class _StandIn(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root not in _ROOTS:
            return None
        if fullname in REAL:
            folder = _folder(root).joinpath(*fullname.split(".")[1:-1])
            return PathFinder.find_spec(fullname, [str(folder)])
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is."""


def _folder(root: str) -> Path:
    spec = PathFinder.find_spec(root)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


class _H100:
    """What the rules ask the platform for."""

    @staticmethod
    def get_device_capability() -> Any:
        return type("Capability", (), {"to_int": lambda self: 90})()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: name in ("is_cuda", "is_device_capability")


def _mapping(root: str, file: str, name: str) -> Any:
    """Read a literal out of a model's source: how it names linears that it runs as one."""
    tree = ast.parse((_folder(root) / file).read_text())
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if getattr(target, "attr", getattr(target, "id", None)) == name:
                return ast.literal_eval(node.value)
    raise LookupError(f"{root}/{file} has no {name}")


def _shapes(folder: Path) -> dict[str, tuple[list[int], str]]:
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(key)
                shapes[key] = part.get_shape(), part.get_dtype()
    return shapes


def _modules(
    shapes: dict[str, Any], fused: dict[str, list[str]]
) -> Iterator[tuple[str, list[str]]]:
    """Give each linear as a server builds it, and the checkpoint's linears that go into it."""
    whole = {part: name for name, parts in fused.items() for part in parts}
    built: dict[str, list[str]] = {}
    for key in shapes:
        name, _, leaf = key.rpartition(".")
        parent, _, last = name.rpartition(".")
        if leaf in ("qweight", "weight") and last in (*_LINEARS, "lm_head"):
            own = f"{parent}.{whole[last]}" if last in whole else name
            built.setdefault(own, []).append(name)
    yield from built.items()


def _check_fit(prefix: str, parts: list[str], shapes: dict[str, Any], made: Any) -> None:
    """Do what a server does when the weights arrive: every tensor needs a place of its shape."""
    bits, size = made
    for part in parts:
        packed = f"{part}.qweight" in shapes
        if packed != (bits is not None):
            raise KeyError(f"{part} is {'packed' if packed else 'dense'}, {prefix} is not")
        if packed:
            (rows, _), _ = shapes[f"{part}.qweight"]
            inputs = rows * 32 // bits
            groups = shapes[f"{part}.scales"][0][0]
            wanted = 1 if size == -1 else inputs // size
            if inputs % 32 or groups != wanted:
                raise ValueError(f"{part}: {groups} groups where {wanted} have a place")


def ask_vllm(folder: Path, config: dict[str, Any]) -> list[str]:
    """Give the kernels that vLLM's code picks; what it raises is its refusal."""
    sys.modules["vllm.platforms"] = platform = _StandIn("vllm.platforms")
    platform.current_platform = _H100()
    from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    # Not by "from": a stand-in would make a name up for what it has not loaded yet.
    gptq_utils = import_module("vllm.model_executor.layers.quantization.utils.gptq_utils")
    marlin_utils = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    given = config["quantization_config"]
    assert AutoGPTQConfig.override_quantization_method(given, None) == "auto_gptq"
    settings = AutoGPTQConfig.from_config(given)
    settings.packed_modules_mapping = fused = _mapping(
        "vllm", "model_executor/models/llama.py", "packed_modules_mapping"
    )
    shapes = _shapes(folder)
    settings.modules_in_block_to_quantize = [
        key.rpartition(".")[0] for key, (_, dtype) in shapes.items() if dtype[0] not in "FB"
    ]
    kernels = set()
    for prefix, parts in _modules(shapes, fused):
        layer = object.__new__(ParallelLMHead if prefix.endswith("lm_head") else LinearBase)
        made = gptq_utils.get_linear_quant_method(settings, layer, prefix, lambda own: own)
        is_packed = isinstance(made, AutoGPTQConfig)
        _check_fit(
            prefix, parts, shapes, (made.weight_bits, made.group_size) if is_packed else (None, 0)
        )
        if is_packed:
            marlin_utils.verify_marlin_supported(made.quant_type, made.group_size)
            inputs = shapes[f"{parts[0]}.qweight"][0][0] * made.pack_factor
            shape = inputs, sum(shapes[f"{part}.qweight"][0][1] for part in parts)
            import torch

            asked = MPLinearLayerConfig(
                shape, shape, made.quant_type, torch.float16, made.group_size, False
            )
            for kernel in (MacheteLinearKernel, MarlinLinearKernel):
                takes, reason = kernel.can_implement(asked)
                if takes:
                    kernels.add(kernel.__name__.removesuffix("LinearKernel"))
                    break
            else:
                raise ValueError(reason)
    return sorted(kernels)


def ask_sglang(folder: Path, config: dict[str, Any]) -> list[str]:
    """Give the kernel that SGLang's code picks; what it raises is its refusal."""
    sys.modules["sglang.srt.utils"] = utils = _StandIn("sglang.srt.utils")
    utils.get_device_capability = lambda: (9, 0)
    utils.is_cuda = lambda: False  # only decides whether compiled kernels are imported
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    marlin_utils = import_module("sglang.srt.layers.quantization.marlin_utils")
    quant_utils = import_module("sglang.srt.layers.quantization.utils")
    given = config["quantization_config"]
    if GPTQMarlinConfig.override_quantization_method(given, None) != "gptq_marlin":
        raise ValueError("Unknown quantization method: gptq")
    settings = GPTQMarlinConfig.from_config(given)
    mapping = _mapping("sglang", "srt/models/llama.py", "stacked_params_mapping")
    fused: dict[str, list[str]] = {}
    for whole, part, _ in mapping:
        fused.setdefault(whole.lstrip("."), []).append(part.lstrip("."))
    shapes = _shapes(folder)
    for prefix, parts in _modules(shapes, fused):
        layer = object.__new__(ParallelLMHead if prefix.endswith("lm_head") else LinearBase)
        made = quant_utils.get_linear_quant_method(settings, layer, prefix, lambda own: own)
        is_packed = isinstance(made, GPTQMarlinConfig)
        _check_fit(
            prefix, parts, shapes, (made.weight_bits, made.group_size) if is_packed else (None, 0)
        )
        if is_packed:
            inputs = shapes[f"{parts[0]}.qweight"][0][0] * (32 // made.weight_bits)
            outputs = sum(shapes[f"{part}.qweight"][0][1] for part in parts)
            if not marlin_utils.check_marlin_supported(made.quant_type, made.group_size):
                raise ValueError(f"group_size={made.group_size}")
            marlin_utils.verify_marlin_supports_shape(outputs, inputs, inputs, made.group_size)
    return ["Marlin"]


def main() -> None:
    sys.meta_path.insert(0, _Finder())
    answers: dict[str, dict[str, Any]] = {
        "versions": {name: importlib.metadata.version(name) for name in _ROOTS}
    }
    for folder in map(Path, sys.argv[1:]):
        config = json.loads((folder / "config.json").read_text())
        answers[folder.name] = own = {}
        for server, ask in (("vLLM", ask_vllm), ("SGLang", ask_sglang)):
            try:
                own[server] = {"kernels": ask(folder, config)}
            except (ValueError, KeyError) as refusal:
                own[server] = {"refusal": re.sub(r"\s+", " ", str(refusal))}
    print(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
