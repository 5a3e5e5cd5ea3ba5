"""Say what of a model would be quantized, what shares an input and what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..architectures import Architecture, knows
from ..nn_modules.surgery import features, find_linears
from ..quantization.config import BaseQuantizeConfig
from .discover import starred
from .fit import fit_settings
from .plan import Plan, make_plan

_BYTES_PER_SCALE = 2  # float16


def overview(model: nn.Module, architecture: Architecture, config: BaseQuantizeConfig) -> str:
    """Describe in lines what quantizing would do. Nothing is changed; meta tensors will do.

    :raises UnsupportedModelError: if there is nothing to quantize
    """
    fitted = fit_settings(model, architecture, config)
    plan = make_plan(model, architecture, fitted)
    linears = find_linears(model)
    known = knows(architecture)
    where = "a row of the table" if known else "found by running one block"
    lines = [
        f"{type(model).__name__}: {len(plan.blocks)} blocks in `{plan.prefix}`, {where}",
        "",
        "quantized, one step a line; what stands in a line reads the same input:",
        *(f"  {line}" for line in _steps(plan, linears)),
    ]
    for title, names in _dense(plan, linears).items():
        if names:
            lines += ["", f"{title}:", *(f"  {name}" for name in names)]
    if fitted.dynamic != config.dynamic:
        lines += ["", "settings of their own, as they will stand in the checkpoint (`dynamic`):"]
        lines += [
            f"  {pattern} {change or ''}" for pattern, change in (fitted.dynamic or {}).items()
        ]
    dense, packed = _sizes(plan, linears)
    lines += [
        "",
        f"these weights: {dense / 1e9:.2f} GB in 16 bits, {packed / 1e9:.2f} GB packed",
    ]
    if not known:
        lines += ["", "the row, for auto_gptq/architectures/table.py:", *as_source(architecture)]
    return "\n".join(lines)


def as_source(architecture: Architecture) -> list[str]:
    """Give a row as Python source."""
    lines = ["Architecture(", f"    block_classes={dict(architecture.block_classes)!r},"]
    lines += [f'    blocks="{architecture.blocks}",', f"    around={architecture.around!r},"]
    lines += ["    steps=(", *(f'        "{step}",' for step in architecture.steps), "    ),"]
    if architecture.head != "lm_head":
        lines.append(f'    head="{architecture.head}",')
    return [*lines, ")"]


def _steps(plan: Plan, linears: Mapping[str, nn.Module]) -> list[str]:
    """Give the steps of all kinds of blocks, each once, with shapes and the number of linears."""
    found: dict[tuple[str, ...], list[str]] = {}
    for i, steps in enumerate(plan.steps):
        for step in steps:
            (kind,) = starred([step])
            found.setdefault(kind, []).extend(f"{plan.prefix}.{i}.{name}" for name in step)
    lines = []
    for kind, names in found.items():
        shapes = {features(linears[name]) for name in names}
        shown = ", ".join(f"{k} → {n}" for k, n in sorted(shapes))
        lines.append(f"{' '.join(kind)}   [{shown}] x {len(names)}")
    return lines


def _dense(plan: Plan, linears: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Give the linears that stay as they are, in the blocks and elsewhere."""
    inside: list[str] = []
    outside: list[str] = []
    for name in linears:
        if name not in plan.settings:
            (inside if name.startswith(f"{plan.prefix}.") else outside).append(name)
    return {
        "dense in the blocks": _kinds(inside),
        "dense elsewhere": _kinds(outside),
    }


def _kinds(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in names:
        ((kind,),) = starred([[name]])
        counts[kind] = counts.get(kind, 0) + 1
    return [f"{kind} x {count}" if count > 1 else kind for kind, count in counts.items()]


def _sizes(plan: Plan, linears: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Give the bytes of the quantized weights in 16 bits and packed."""
    dense = packed = 0
    for name, settings in plan.settings.items():
        inputs, outputs = features(linears[name])
        groups = 1 if settings.group_size == -1 else -(-inputs // settings.group_size)
        dense += 2 * inputs * outputs
        packed += inputs * outputs * settings.bits // 8
        packed += groups * outputs * (8 * _BYTES_PER_SCALE + settings.bits) // 8
    return dense, packed
