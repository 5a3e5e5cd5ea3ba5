"""Run a model's entry once per batch and note what each decoder block is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activations
from .examples import Batch, model_inputs


@dataclass(frozen=True)
class Carried:
    """Stands, in a block's call, for what the block before it puts out beside hidden states."""

    index: int  # in that block's outputs


@dataclass
class BlockCall:
    """How one block is called on one batch, its hidden states left out."""

    args: tuple[Any, ...]  # after the hidden states
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...] = ()  # of the block once it has run, None for the hidden states

    def carry_on(self, before: BlockCall) -> None:
        """Put in what the block before has put out."""
        args = [*self.args, *self.kwargs.values()]
        if any(isinstance(value, Carried) for value in args):
            values = [before.outputs[x.index] if isinstance(x, Carried) else x for x in args]
            self.args = tuple(values[: len(self.args)])
            self.kwargs = dict(zip(self.kwargs, values[len(self.args) :], strict=True))

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockCall:
        """Move all tensors, and give floating ones the dtype of the block."""
        return BlockCall(_moved(self.args, device, dtype), _moved(self.kwargs, device, dtype))


@dataclass
class Captured:
    """The hidden states that enter block 0, and every block's call, per batch."""

    hidden: Activations  # per batch: [B, T, hidden size]
    calls: list[list[BlockCall]]  # per block, per batch
    keep: list[Tensor | None]  # per batch: [B, T] bool, False where padded; None if nowhere
    outputs: int = 0  # how many values a block gives in a tuple; 0 for hidden states alone


class _Reached(Exception):
    """Ends a forward pass after what is wanted was noted."""


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    hidden: Activations | None = None,
) -> Captured:
    """Run everything before the blocks; the blocks themselves hand their input through.

    Each block's own arguments are kept, because a model may give its blocks different ones (masks
    of sliding and full attention, say).  Only the very first batch runs through block 0 for real,
    to see whether blocks return a tensor or a tuple.

    :param hidden: where hidden states go, as long as it is empty; None for where they arise
    :raises NumericsError: if the hidden states hold NaN or infinity
    """
    first = next(model.parameters())
    device = first.device if hidden is None else hidden.device
    if hidden is None:
        hidden = Activations(device, first.dtype, 0, home="device")
    result = Captured(hidden, [[] for _ in blocks], [])
    with _recording(blocks, result):
        for batch in batches:
            mask = batch.attention_mask.to(device)
            with suppress(_Reached):
                model(**model_inputs(model, batch, device))
            result.keep.append(None if bool(batch.attention_mask.all()) else mask.bool())
    result.hidden.check_finite("The hidden states before the first block")
    return result


def trace(model: nn.Module, blocks: Sequence[nn.Module], tokens: int) -> Captured:
    """Do the same with one row of tokens, without looking at values: meta tensors will do."""
    first = next(model.parameters())
    ids = torch.arange(tokens, device=first.device)[None]
    inputs = model_inputs(model, Batch(ids, torch.ones_like(ids)), first.device)
    masks = [inputs.pop("attention_mask", None)]
    if first.is_meta and masks != [None]:
        # Of one with two dimensions transformers looks at the values; other code wants just that.
        masks = [first.new_zeros(1, 1, tokens, tokens), *masks, None]
    failure: Exception | None = None
    for mask in masks:
        hidden = Activations(first.device, first.dtype, 0, home="device")
        result = Captured(hidden, [[] for _ in blocks], [None])
        masked = inputs if mask is None else inputs | {"attention_mask": mask}
        try:
            with _recording(blocks, result), suppress(_Reached):
                model(**masked)
        except (RuntimeError, TypeError, ValueError) as error:
            failure = failure or error
        else:
            return result
    assert failure is not None
    raise failure


def capture_head(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    captured: Captured,
    head: nn.Module,
) -> None:
    """Replace the hidden states that the last block put out by those that enter the output head.

    The model itself runs what lies between: usually a norm, sometimes a projection.
    """
    device = captured.hidden.device

    def note(_head: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.hidden[index] = args[0]
        raise _Reached

    def stand_in(_index: int, _forward: Any) -> Any:
        def put_out(*_args: Any, **_kwargs: Any) -> Any:
            return _put_out(captured.hidden[index], captured.outputs)

        return put_out

    handle = head.register_forward_pre_hook(note)
    try:
        with forwards_replaced(blocks, stand_in):
            for index in range(len(batches)):
                batch = batches[index]
                with suppress(_Reached):
                    model(**model_inputs(model, batch, device))
    finally:
        handle.remove()


def after_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, hidden: Tensor, outputs: int
) -> Any:
    """Give what the model puts out where its last block gives these hidden states.

    :param outputs: see :class:`Captured`
    """

    def stand_in(_index: int, _forward: Any) -> Any:
        return lambda *_args, **_kwargs: _put_out(hidden, outputs)

    with forwards_replaced(blocks, stand_in):
        return model(**model_inputs(model, batch, hidden.device))


@contextmanager
def _recording(blocks: Sequence[nn.Module], result: Captured) -> Iterator[None]:
    """Replace the forward of each block, on the instance, by one that notes and passes through."""
    outputs: list[int] = []

    def recorder(index: int, forward: Any) -> Any:
        def note(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if index == 0:
                result.hidden.append(hidden)
            result.calls[index].append(call)
            if not outputs:
                real = forward(*args, **kwargs)
                outputs.append(len(real) if isinstance(real, (tuple, list)) else 0)
                result.outputs = outputs[0]
            if index == len(blocks) - 1:
                raise _Reached
            return _put_out(hidden, outputs[0])

        return note

    with forwards_replaced(blocks, recorder):
        yield


def _put_out(hidden: Tensor, outputs: int) -> Any:
    """Give hidden states as a block does."""
    return (hidden, *map(Carried, range(1, outputs))) if outputs else hidden


@contextmanager
def forwards_replaced(
    blocks: Sequence[nn.Module], make: Callable[[int, Any], Any]
) -> Iterator[None]:
    """Give each block, on the instance, the forward that ``make(index, its own)`` returns."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = make(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Part the hidden states, first argument or `hidden_states`, from the others."""
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    return value
