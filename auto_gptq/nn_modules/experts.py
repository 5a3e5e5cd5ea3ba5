"""Fused experts made modules of their own, whose linears can be solved, packed and saved.

transformers 5 keeps the experts of a block in one parameter per projection, ``[E, 2I, H]`` for
gate and up, say.  :func:`unfuse` puts in its place children ``"0"`` to ``"E-1"``, each with linears
named as in the checkpoints that the community shares.  It works on meta tensors too, where a
quantized checkpoint is about to be loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .unfused import (
    DOWN,
    GATE,
    UP,
    BatchedExperts,
    Layout,
    RoutedExperts,
    SplitExperts,
    UnfusedExperts,
    find_unfused,
    layout_of,
)

_DEFAULT_NAMES = {part: f"{part}_proj" for part in (GATE, UP, DOWN)}


@dataclass(frozen=True)
class Stack:
    """One fused parameter: the weights of one or two projections of all experts."""

    parameter: str
    parts: tuple[str, ...]  # what is stacked along the outputs
    transposed: bool = False  # [E, in, out] instead of [E, out, in]
    interleaved: bool = False  # outputs gate0, up0, gate1, ... instead of all gates, then all ups
    bias: str | None = None  # name of the parameter [E, out]


def find_fused(model: nn.Module) -> dict[str, nn.Module]:
    """Give the modules that hold fused experts by their dotted names."""
    return {name: module for name, module in model.named_modules() if _kind_of(module) is not None}


def expert_parents(model: nn.Module, names: Collection[str]) -> list[str]:
    """Give the names of fused modules of which a checkpoint holds the experts one by one.

    :param names: of the checkpoint's tensors, as the model calls them
    """
    heads = {name.rsplit(".", 3)[0] for name in names} | {name.rsplit(".", 2)[0] for name in names}
    found = []
    for name, module in find_fused(model).items():
        container = _joined(name, _KINDS.get(type(module).__name__, _ROUTED).container)
        if any(head == container for head in heads):
            found.append(name)
    return found


def unfuse(model: nn.Module, only: Container[str] | None = None) -> list[str]:
    """Part the fused experts below ``model`` in place, and give the names of their modules.

    Parameters become linears of the same values, dtype and device.

    :param only: names of the modules to part; None for all
    """
    fused = {n: m for n, m in find_fused(model).items() if only is None or n in only}
    if fused:
        known = _names_in_checkpoints(model)
        for name, module in fused.items():
            _unfuse_module(name, module, known)
    return list(fused)


def expert_groups(model: nn.Module) -> dict[str, list[str]]:
    """Give, per module of parted experts, the full names of all their linears."""
    groups = {}
    for name, module in find_unfused(model).items():
        layout = layout_of(module)
        inside = _joined(name, layout.container)
        groups[name] = [
            _joined(f"{inside}.{expert}", leaf)
            for expert in range(layout.count)
            for leaf in layout.names.values()
        ]
    return groups


@dataclass(frozen=True)
class _Kind:
    """How one class of modules keeps and calls its experts."""

    forward: type[UnfusedExperts]
    stacks: tuple[Stack, ...] | None = None  # None: told by the module's flags
    container: str = ""
    names: dict[str, str] | None = None  # None: the checkpoint's


_PARTED: dict[type[nn.Module], type[nn.Module]] = {}  # a model's own class → the one put in front
_ROUTED = _Kind(RoutedExperts)
# Classes that do not say by flags of transformers' `use_experts_implementation` how they are laid
# out.  The names of DBRX's and JetMoe's experts are those of converted checkpoints.
_KINDS = {
    "Llama4TextExperts": _Kind(
        BatchedExperts,
        (
            Stack("gate_up_proj", (GATE, UP), transposed=True),
            Stack("down_proj", (DOWN,), transposed=True),
        ),
    ),
    "DbrxExperts": _Kind(
        RoutedExperts,
        (Stack("w1", (GATE,)), Stack("v1", (UP,)), Stack("w2", (DOWN,), transposed=True)),
        container="mlp",
        names={GATE: "w1", UP: "v1", DOWN: "w2"},
    ),
    "JetMoeParallelExperts": _Kind(SplitExperts, (Stack("weight", (DOWN,)),), names={DOWN: ""}),
}


def _kind_of(module: nn.Module) -> _Kind | None:
    """Give how a module keeps fused experts; None if it has none."""
    if isinstance(module, UnfusedExperts):
        return None
    kind = _KINDS.get(type(module).__name__)
    if kind is not None:
        return kind
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    fused = [module._parameters.get(name) for name in (first, "down_proj")]
    is_fused = all(p is not None and p.dim() == 3 for p in fused)
    return _ROUTED if is_fused else None


def _stacks(module: Any, kind: _Kind) -> tuple[Stack, ...]:
    """Read how fused experts are laid out off the flags that transformers sets."""
    if kind.stacks is not None:
        return kind.stacks
    transposed = getattr(module, "is_transposed", False)
    interleaved = not getattr(module, "is_concatenated", True)
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    parts = (GATE, UP) if first == "gate_up_proj" else (UP,)
    has_bias = getattr(module, "has_bias", False)
    return (
        Stack(first, parts, transposed, interleaved, f"{first}_bias" if has_bias else None),
        Stack("down_proj", (DOWN,), transposed, bias="down_proj_bias" if has_bias else None),
    )


def _unfuse_module(name: str, module: Any, known: dict[tuple[str, ...], list[str]]) -> None:
    kind = _KINDS.get(type(module).__name__, _ROUTED)
    stacks = _stacks(module, kind)
    container = module.get_submodule(kind.container)
    count = _expert_count(module, container, stacks)
    names = dict(kind.names) if kind.names else _child_names(name, stacks, known)
    experts = [nn.Module() for _ in range(count)]
    for stack in stacks:
        for e, linears in enumerate(_linears(container, stack, count)):
            for part, linear in zip(stack.parts, linears, strict=True):
                if names[part]:
                    experts[e].add_module(names[part], linear)
                else:
                    experts[e] = linear
    for stack in stacks:
        for parameter in (stack.parameter, stack.bias):
            container._parameters.pop(parameter, None)
    for e, expert in enumerate(experts):
        container.add_module(str(e), expert)
    for part_of in (module, container, *container.modules()):
        part_of._is_hf_initialized = True  # its parameters have no other name to be filled under
    module._auto_gptq_layout = Layout(
        count, names, kind.container, any(stack.interleaved for stack in stacks)
    )
    module.__class__ = _parted_class(type(module), kind.forward)


def _parted_class(own: type[nn.Module], forward: type[UnfusedExperts]) -> type[nn.Module]:
    if own not in _PARTED:
        # Of the same name: accelerate asks for it when it spreads a model over devices.
        _PARTED[own] = type(own.__name__, (forward, own), {"__module__": own.__module__})
    return _PARTED[own]


def _expert_count(module: Any, container: Any, stacks: Sequence[Stack]) -> int:
    last: Tensor = container._parameters[stacks[-1].parameter]
    # LongCat has rows in gate_up_proj for experts that do nothing, DBRX stacks all in two
    # dimensions.
    return len(last) if last.dim() > 2 else int(module.num_experts)


def _linears(container: Any, stack: Stack, count: int) -> Iterator[list[nn.Linear]]:
    """Give each expert's linears of one stack, in the order of its parts."""
    fused: Tensor = container._parameters[stack.parameter].detach()
    biases: Tensor | None = None if stack.bias is None else container._parameters[stack.bias]
    per_expert = fused.view(count, -1, fused.shape[-1]) if fused.dim() == 2 else fused
    for e in range(count):
        weight = per_expert[e].t() if stack.transposed else per_expert[e]
        bias = None if biases is None else biases.detach()[e]
        yield [
            _linear(rows, None if bias is None else bias_rows)
            for rows, bias_rows in zip(
                _parts(weight, stack), _parts(weight if bias is None else bias, stack), strict=True
            )
        ]


def _parts(tensor: Tensor, stack: Stack) -> list[Tensor]:
    count = len(stack.parts)
    if stack.interleaved:
        return [tensor[i::count] for i in range(count)]
    return list(tensor.chunk(count))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear


def _child_names(
    name: str, stacks: Sequence[Stack], known: dict[tuple[str, ...], list[str]]
) -> dict[str, str]:
    """Give what checkpoints call the linears of an expert."""
    names = dict(_DEFAULT_NAMES)
    for stack in stacks:
        path = tuple(_joined(name, stack.parameter).split("."))
        for target, sources in known.items():
            if path[-len(target) :] == target and len(sources) == len(stack.parts):
                names |= dict(zip(stack.parts, sources, strict=True))
    return {part: names[part] for stack in stacks for part in stack.parts}


def _names_in_checkpoints(model: Any) -> dict[tuple[str, ...], list[str]]:
    """Read the names off transformers' own rules: last parts of a fused name → linears' names."""
    if not hasattr(model, "base_model_prefix"):  # no model of transformers
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    known: dict[tuple[str, ...], list[str]] = {}
    for rule in get_model_conversion_mapping(model, add_legacy=False):
        sources = [pattern.replace("\\", "").rstrip("$") for pattern in rule.source_patterns]
        if hasattr(rule, "operations") and all(
            ".*." in source and source.endswith(".weight") for source in sources
        ):
            for target in rule.target_patterns:
                path = tuple(target.replace("\\", "").lstrip("^.").rstrip("$").split("."))
                known[path] = [source.split(".")[-2] for source in sources]
    return known


def _joined(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name
