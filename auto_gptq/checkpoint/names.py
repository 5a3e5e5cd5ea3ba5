"""Names of tensors on disk, as the community knows them, and in a model of today's transformers.

transformers 5 builds some models otherwise than they are stored, and keeps rules to translate
names and, for a few dense tensors, values. Both directions use its rules here. Packed linears are
never converted, only renamed: parted experts lie one by one, as on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

# Leaves of a packed linear's tensors, which follow the name of its dense weight.
_PACKED = {"qweight", "qzeros", "scales", "g_idx", "B", "s"}
Rename = Callable[[str], str]


def packed_owners(names: Iterable[str]) -> set[str]:
    """Give the names of the linears that are packed, by the names of all tensors."""
    present = set(names)
    split = [name.rpartition(".") for name in present]
    return {
        owner
        for owner, _, leaf in split
        if leaf == "qweight" or (leaf == "B" and f"{owner}.s" in present)
    }


def in_model(model: Any, names: Iterable[str], known: Callable[[str], bool]) -> dict[str, str]:
    """Give what the tensors of a checkpoint are called in a model.

    :param known: tells whether the model has, or will have, a tensor of a name
    """
    rename, names = _renamer(model, reverse=False), list(names)
    prefix = getattr(model, "base_model_prefix", "")
    owners = packed_owners(names)
    result = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        packed = owner in owners
        key = f"{owner}.weight" if packed else name
        candidates = [rename(key), key]
        if prefix:  # a model with a head, or its base, from a checkpoint of the other
            candidates += [f"{prefix}.{c}" for c in candidates]
            candidates += [c.removeprefix(f"{prefix}.") for c in candidates[:2]]
        found = next((c for c in candidates if known(c)), candidates[0])
        result[name] = found.removesuffix("weight") + leaf if packed else found
    return result


def on_disk(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Give what a model's packed linears, by name, are called in a checkpoint."""
    rename = _renamer(model, reverse=True)
    return {name: rename(f"{name}.weight").removesuffix(".weight") for name in names}


def dense_on_disk(
    model: Any, tensors: Mapping[str, Tensor], packed: Iterable[str]
) -> dict[str, Tensor]:
    """Give a model's dense tensors as they lie in a checkpoint.

    Linears that would be converted, but of whose kind others are packed, keep the model's names:
    transformers takes such rules back where packed linears are concerned.

    :param packed: names of the packed linears
    """
    if not _has_rules(model):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    rules = [rule for rule in _rules(model, reverse=True) if hasattr(rule, "operations")]
    broken = [r for r in rules if any(r.rename_source_key(f"{n}.weight")[1] for n in packed)]
    kept = {n: t for n, t in tensors.items() if any(r.rename_source_key(n)[1] for r in broken)}
    others = {name: tensor for name, tensor in tensors.items() if name not in kept}
    return kept | dict(revert_weight_conversion(model, others))


def convertible(model: Any, names: Iterable[str]) -> set[str]:
    """Give those tensors of a checkpoint that are converted, not only renamed, on their way."""
    rename = _renamer(model, reverse=False)
    return {name for name in names if _converter_of(model, rename(name))[0] is not None}


def converted(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert dense tensors of a checkpoint to those that the model has."""
    from transformers.core_model_loading import dot_natural_key

    rename = _renamer(model, reverse=False)
    running: dict[str, Any] = {}
    for name in sorted(tensors, key=dot_natural_key):
        rule, target, pattern = _converter_of(model, rename(name))
        if rule is not None:
            running.setdefault(target, deepcopy(rule)).add_tensor(
                target, name, pattern, tensors[name]
            )
    result: dict[str, Tensor] = {}
    for target, rule in running.items():
        values = rule.convert(target, model=model, config=model.config)
        for name, value in values.items():
            result[name] = value[0] if isinstance(value, list) else value
    return result


def _converter_of(model: Any, name: str) -> tuple[Any, str, str | None]:
    for rule in _rules(model):
        if hasattr(rule, "operations"):
            target, pattern = rule.rename_source_key(name)
            if pattern is not None:
                return rule, target, pattern
    return None, name, None


def _renamer(model: Any, *, reverse: bool) -> Rename:
    rules = [rule for rule in _rules(model, reverse=reverse) if not hasattr(rule, "operations")]

    def rename(name: str) -> str:
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        return name

    return rename


def _rules(model: Any, *, reverse: bool = False) -> list[Any]:
    """Give transformers' rules for a model; copied, because they note which of them were used."""
    if not _has_rules(model):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if not reverse:
        return list(deepcopy(get_model_conversion_mapping(model)))
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:
        # Of a prefix nobody knows here whether the checkpoint had it.
        rules = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    return [rule.reverse_transform() for rule in deepcopy(rules)[::-1]]


def _has_rules(model: Any) -> bool:
    """Tell a model of transformers 5; 4 builds models as they are stored."""
    try:
        import transformers.core_model_loading
    except ImportError:
        return False
    return isinstance(model, transformers.PreTrainedModel)
