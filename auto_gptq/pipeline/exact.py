"""The full-precision model beside the one that is being quantized.

A quantized model's hidden states wander away from those of the full-precision model, and each
linear can be made to lead back.  To see how far they are, the first batches run through each block
in both ways, with the weights exchanged in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.capture import BlockCall
from ..nn_modules.unfused import find_unfused

_LOOKED_AT = 1 << 20  # numbers of each tensor that are compared
# In 16 bits a block's change is the sum of what its linears add but for this share.
_TOLERANCE = 0.03
_LEAST_FACTOR = 0.05  # on a linear that writes; others come out as nearly 0
_LEAST_GAIN = 0.1  # of a norm's mean gain: what it hides more than that is not made up for


@dataclass(frozen=True)
class Writer:
    """How a linear's output gets into the residual stream."""

    norm: str = ""  # the module that it goes through, if any: in Gemma 3 and OLMo 2 a norm
    factor: float = 1.0  # and what it is multiplied by, as in Granite


class Exact:
    """The full-precision weights of some linears, and which linears write to the residual stream.

    :param writers: by names in the block, in their order, from :func:`find_writers`
    """

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], writers: Mapping[str, Writer]
    ) -> None:
        self.writers = writers
        self._block = block
        self._experts = tuple(f"{name}." for name in find_unfused(block))
        self._kept: list[tuple[nn.Module, Tensor]] = [
            (linear, _data(linear).clone()) for linear in linears.values()
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the block be the full-precision one."""
        now = [_data(linear) for linear, _ in self._kept]
        try:
            for linear, original in self._kept:
                linear.weight.data = original
            yield
        finally:
            for (linear, _), data in zip(self._kept, now, strict=True):
                linear.weight.data = data

    def matching(self, name: str, exact: Tensor | None, x: Tensor, tokens: int) -> Tensor | None:
        """Give a linear's full-precision input if its rows are those of ``x``, of all tokens.

        Experts are given a choice of tokens, which the two models make differently.
        """
        if exact is None or exact.shape != x.shape or x.shape[:-1].numel() != tokens:
            return None
        return None if name.startswith(self._experts) else exact

    @contextmanager
    def watched(self, written: Callable[[Tensor], None]) -> Iterator[None]:
        """Tell what is added to the residual stream, whenever it is."""

        def hook(factor: float) -> Any:
            return lambda _module, _args, output: written(
                output if factor == 1 else output * factor
            )

        handles = [
            self._block.get_submodule(writer.norm or name).register_forward_hook(
                hook(writer.factor)
            )
            for name, writer in self.writers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gap(
        self,
        name: str,
        wanted: Tensor | None,  # [..., K] the linear's inputs in the full-precision model
        exact: Tensor | None,  # [B, T, hidden] that model's residual stream
        residual: Tensor | None,  # [B, T, hidden] and the quantized one's
    ) -> Tensor | None:
        """Give what a linear that is still to be solved should put out besides, None if nothing.

        That is how far the residual streams are apart, taken back through what follows the linear.
        """
        writer = self.writers.get(name)
        if writer is None or wanted is None or exact is None or residual is None:
            return None
        gap = (exact - residual).reshape(*wanted.shape[:-1], residual.shape[-1])
        if writer.factor != 1:
            gap = gap / writer.factor
        if writer.norm:
            # Not called, but its method: our own hooks wait for its call.
            output = self._block.get_submodule(name).forward(wanted)
            gap = gap * _slope(self._block.get_submodule(writer.norm), output).to(gap.dtype)
        return gap


def _slope(norm: nn.Module, x: Tensor) -> Tensor:
    """Give the inputs of a norm by its outputs: a size per token over a gain per channel."""
    size = x.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    unit = (x / size).flatten(0, -2)
    after = norm.forward(x).float().flatten(0, -2)
    gain = (after * unit).sum(0) / unit.square().sum(0).clamp(min=1e-12)
    least = (_LEAST_GAIN * gain.square().mean().sqrt()).square()
    slope: Tensor = size * (gain / (gain.square() + least))
    return slope


@dataclass
class _Written:
    """What a linear puts out, perhaps through another module."""

    output: Tensor
    norm: str = ""


def find_writers(
    block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, call: BlockCall
) -> dict[str, Writer]:
    """Find the linears whose outputs, added to the block's input, make its output.

    Most blocks add what ``o_proj`` and ``down_proj`` put out, some through a norm or times a
    factor.  Where something else comes in between there are none.  Runs one batch.
    """
    found: dict[str, _Written] = {}
    handles = [
        module.register_forward_hook(_noting(name, name in linears, hidden.shape, found))
        for name, module in block.named_modules()
        if not any(module.children())
    ]
    try:
        result = block(hidden, *call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    result = result[0] if isinstance(result, tuple) else result
    if not found:
        return {}
    change = _few(result) - _few(hidden)
    added = torch.stack([_few(written.output) for written in found.values()], 1)
    shares = torch.linalg.pinv(added.t() @ added, hermitian=True) @ (added.t() @ change)
    shares = torch.where((shares - 1).abs() < _TOLERANCE, 1.0, shares)
    shares = torch.where(shares < _LEAST_FACTOR, 0.0, shares)
    left = (change - added @ shares).norm()
    if not left < _TOLERANCE * change.norm():
        return {}
    return {
        name: Writer(written.norm, share)
        for (name, written), share in zip(found.items(), shares.tolist(), strict=True)
        if share
    }


def _noting(name: str, is_linear: bool, shape: torch.Size, found: dict[str, _Written]) -> Any:
    """Note what linears put out, and what modules that read that make of it."""

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Some blocks flatten batch and time on the way.
        if not isinstance(output, Tensor) or output.numel() != shape.numel():
            return
        if output.shape[-1] != shape[-1]:
            return
        if is_linear:
            found[name] = _Written(output)
            return
        for written in found.values():  # in evaluation dropout gives back what it got
            if args and args[0] is written.output and output is not written.output:
                written.output, written.norm = output, name

    return hook


def _few(x: Tensor) -> Tensor:
    return x.flatten()[:_LOOKED_AT].to(torch.float64)


def _data(linear: nn.Module) -> Tensor:
    data: Tensor = linear.weight.data  # type: ignore[assignment]
    return data
