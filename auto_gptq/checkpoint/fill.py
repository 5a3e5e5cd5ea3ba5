"""Fill a model from a checkpoint: compare all names, shapes and dtypes, then take the values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn_modules.qlinear.linear import QuantLinear
from .layouts import LAYOUTS
from .reader import Header, WeightFiles, read_tensors

logger = logging.getLogger(__name__)

_MOST_NAMES_SHOWN = 8
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class _Slot:
    """A place in the model that one tensor of the checkpoint fills."""

    shape: list[int]
    dtypes: str  # "int32", "integers" or "floats": what the file may hold; "" for anything
    take: Callable[[Tensor], None]
    optional: bool = False


def fill(
    model: nn.Module,
    weights: WeightFiles,
    headers: dict[str, Header],
    layouts: Mapping[str, str],
    *,
    torch_dtype: torch.dtype,
    contiguous: Container[str],
) -> None:
    """Load every tensor of a checkpoint into a model that has its QuantLinears in place.

    :param layouts: per name of a QuantLinear the layout of its tensors on disk
    :param torch_dtype: what dense weights become
    :param contiguous: names of QuantLinears with contiguous groups, whose ``g_idx``, which some
        tools leave out, may be missing
    :raises CheckpointError: naming tensors that are missing, misshapen, of a wrong dtype, or hold
        what would make every output wrong
    """
    slots = _dense_slots(model, torch_dtype)
    for name, layout in layouts.items():
        slots |= _packed_slots(name, model.get_submodule(name), layout, name in contiguous)
    _check(model, slots, headers)
    for name, tensor in read_tensors(weights, slots.keys()):
        slots[name].take(tensor)
    for name in layouts:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        layer.check(name)


def check_packed(
    layers: Mapping[str, QuantLinear],
    weights: WeightFiles,
    headers: dict[str, Header],
    layouts: Mapping[str, str],
    *,
    contiguous: Container[str],
) -> None:
    """Compare a checkpoint with the layers that its packed tensors are for, where others fill them.

    :param layers: by their names in the checkpoint; on whatever device
    :raises CheckpointError: as :func:`fill` does, before a weight is read
    """
    slots: dict[str, _Slot] = {}
    superfluous: dict[str, _Slot] = {}
    for name, layer in layers.items():
        own = _packed_slots(name, layer, layouts[name], name in contiguous)
        slots |= own
        if layer.bias is None and f"{name}.bias" in headers:
            superfluous[f"{name}.bias"] = own[f"{name}.bias"]
    _refuse_missing([n for n, s in slots.items() if n not in headers and not s.optional], headers)
    for name, slot in slots.items():
        if name in headers:
            _check_header(name, slot, headers[name])
    for name, tensor in read_tensors(weights, superfluous) if superfluous else ():
        superfluous[name].take(tensor)


def some(names: Iterable[str], most: int = _MOST_NAMES_SHOWN) -> str:
    """Give the first few of many names."""
    listed = list(names)
    shown = ", ".join(listed[:most])
    more = len(listed) - most
    return f"{shown} and {more} more" if more > 0 else shown


def _packed_slots(name: str, layer: nn.Module, layout: str, contiguous: bool) -> dict[str, _Slot]:
    assert isinstance(layer, QuantLinear)
    slots = {}
    for buffer, stored in LAYOUTS[layout].items():
        kind = {"scales": "floats", "g_idx": "integers"}.get(buffer, "int32")
        slots[f"{name}.{stored.name}"] = _Slot(
            list(stored.shape(layer)),
            kind,
            partial(_take_buffer, layer, buffer, stored.decode),
            optional=buffer == "g_idx" and contiguous,
        )
    if layer.bias is None:  # AutoGPTQ before 0.8 wrote zeros for every layer
        refuse = partial(_refuse_bias, f"{name}.bias")
        slots[f"{name}.bias"] = _Slot([layer.out_features], "floats", refuse, optional=True)
    else:
        take = partial(_take_buffer, layer, "bias", lambda tensor: tensor)
        slots[f"{name}.bias"] = _Slot([layer.out_features], "floats", take)
    return slots


def _take_buffer(
    layer: QuantLinear, buffer: str, decode: Callable[[Tensor], Tensor], tensor: Tensor
) -> None:
    if buffer == "g_idx":  # some tools write int64; what does not fit int32 must stay out of range
        limits = torch.iinfo(torch.int32)
        tensor = tensor.long().clamp(limits.min, limits.max).to(torch.int32)
    setattr(layer, buffer, decode(tensor))  # scales keep the precision they are stored in


def _refuse_bias(name: str, tensor: Tensor) -> None:
    if tensor.count_nonzero():
        raise CheckpointError(
            f"{name} holds {int(tensor.count_nonzero())} values other than 0, but the model's "
            "linear has no bias; the checkpoint belongs to another model."
        )


def _dense_slots(model: nn.Module, torch_dtype: torch.dtype) -> dict[str, _Slot]:
    slots = {}
    for name, tensor in model.state_dict().items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if not isinstance(owner, QuantLinear):
            kind = "floats" if tensor.is_floating_point() else ""
            take = partial(_take_dense, owner, leaf, torch_dtype)
            slots[name] = _Slot(list(tensor.shape), kind, take)
    return slots


def _take_dense(owner: nn.Module, leaf: str, torch_dtype: torch.dtype, tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor = tensor.to(torch_dtype)
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor)


def _check(model: nn.Module, slots: dict[str, _Slot], headers: Mapping[str, Header]) -> None:
    """Compare the checkpoint's tensors with the model's before any is loaded."""
    tied = _tied_names(model)
    missing = sorted(
        name
        for name, slot in slots.items()
        if name not in headers
        and not slot.optional
        and not any(twin in headers for twin in tied.get(name, ()))
    )
    _refuse_missing(missing, headers)
    for name, header in headers.items():
        if name in slots:
            _check_header(name, slots[name], header)
    unexpected = [name for name in headers if name not in slots]
    if unexpected:
        logger.warning("Ignoring tensors that the model does not have: %s", some(unexpected))


def _refuse_missing(names: list[str], headers: Mapping[str, Header]) -> None:
    if names:
        where = next(iter(headers.values())).file.parent
        raise CheckpointError(
            f"The checkpoint in {where} lacks {len(names)} tensors: {some(names)}. "
            "It is incomplete, or belongs to another model."
        )


def _check_header(name: str, slot: _Slot, header: Header) -> None:
    if header.shape != slot.shape:
        raise CheckpointError(
            f"{name} has shape {header.shape} in {header.file}, but the model and the quantization "
            f"config (bits, group_size) ask for {slot.shape}."
        )
    fits = {
        "int32": header.dtype == torch.int32,
        "integers": header.dtype in _INTEGERS,
        "floats": header.dtype is not None and header.dtype.is_floating_point,
        "": True,
    }
    if not fits[slot.dtypes]:
        raise CheckpointError(
            f"{name} has dtype {header.dtype} in {header.file}; it must be {slot.dtypes}."
        )


def _tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Give, for each parameter's name, all names of the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() for name in group}
