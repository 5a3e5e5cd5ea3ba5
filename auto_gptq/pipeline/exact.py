"""The full-precision model beside the one that is being quantized.

A quantized model's hidden states wander away from those of the full-precision model, and each
linear can be made to lead back.  To see how far they are, the first batches run through each block
in both ways, with the weights exchanged in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.capture import BlockCall
from ..nn_modules.qlinear.linear import dense_weight
from ..nn_modules.unfused import find_unfused

_LOOKED_AT = 1 << 20  # numbers of each tensor that are compared
# In 16 bits a block's change is the sum of what its linears add but for this share.
_TOLERANCE = 0.03


class Exact:
    """The full-precision weights of some linears, and which linears write to the residual stream.

    :param writers: names in the block, in their order, from :func:`find_writers`
    """

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], writers: list[str]
    ) -> None:
        self.writers = writers
        self._block = block
        self._linears = linears
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

    def compare(
        self,
        name: str,
        x: Tensor,  # [..., K] inputs of a linear that is not solved yet
        residual: Tensor | None,  # [B, T, hidden] the residual stream before it, if it writes to it
        exact: Tensor | None,  # the same two in the full-precision model, if it is known
        exact_residual: Tensor | None,
        tokens: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Give a linear's full-precision input, or else what all its outputs lack.

        The outputs of one that writes to the residual stream lack what they would be on the
        full-precision input, and besides how far the streams before it are apart.
        """
        wanted = self.matching(name, exact, x, tokens)
        if wanted is None or name not in self.writers:
            return wanted, None
        assert residual is not None and exact_residual is not None
        weight = dense_weight(self._linears[name])
        apart = (exact_residual - residual).to(x.dtype).reshape(-1, len(weight))
        lack = torch.addmm(apart, (wanted - x).reshape(-1, x.shape[-1]), weight.t())
        return None, lack.view(*x.shape[:-1], len(weight))

    @contextmanager
    def watched(self, written: Callable[[Tensor], None]) -> Iterator[None]:
        """Tell what is added to the residual stream, whenever it is."""

        def hook(_linear: nn.Module, _args: Any, output: Tensor) -> None:
            written(output)

        handles = [
            self._block.get_submodule(name).register_forward_hook(hook) for name in self.writers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_writers(
    block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, call: BlockCall
) -> list[str]:
    """Name the linears whose outputs, added to the block's input, make its output.

    Most blocks add what ``o_proj`` and ``down_proj`` put out.  Where something comes in between, a
    norm or a factor, there are none; nor where one reads what another linear reads, too.  Runs one
    batch.
    """
    outputs: dict[str, Tensor] = {}
    read: dict[str, int] = {}  # where their inputs lay
    inputs: list[Tensor] = []  # of all linears; that they are held keeps their addresses apart

    def noting(name: str) -> Any:
        def hook(_linear: nn.Module, args: Any, output: Tensor) -> None:
            inputs.append(args[0])
            read[name] = args[0].data_ptr()
            # Some blocks flatten batch and time on the way.
            if output.numel() == hidden.numel() and output.shape[-1] == hidden.shape[-1]:
                outputs[name] = output

        return hook

    handles = [linear.register_forward_hook(noting(name)) for name, linear in linears.items()]
    try:
        result = block(hidden, *call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    result = result[0] if isinstance(result, tuple) else result
    if not outputs:
        return []
    change = _few(result) - _few(hidden)
    added = torch.stack([_few(output) for output in outputs.values()], 1)
    shares = torch.linalg.pinv(added.t() @ added, hermitian=True) @ (added.t() @ change)
    does = shares > 1 / 2
    left = (change - added[:, does].sum(1)).norm()
    if not left < _TOLERANCE * change.norm():
        return []
    writers = [name for name, writes in zip(outputs, does.tolist(), strict=True) if writes]
    readers = Counter(read.values())
    return writers if all(readers[read[name]] == 1 for name in writers) else []


def _few(x: Tensor) -> Tensor:
    return x.flatten()[:_LOOKED_AT].to(torch.float64)


def _data(linear: nn.Module) -> Tensor:
    data: Tensor = linear.weight.data  # type: ignore[assignment]
    return data
