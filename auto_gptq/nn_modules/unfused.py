"""Experts that are modules of their own: how they run, while calibrating and packed.

While a model is quantized each linear is called by itself.  Once all are packed, one call of an
operator runs a projection of all experts (:mod:`.grouped`), unless somebody watches or has changed
a linear, or wants its gradient.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import expert_ops, ops
from .grouped import GroupedExperts, Place, group
from .qlinear.linear import QuantLinear

logger = logging.getLogger(__name__)

GATE, UP, DOWN = "gate", "up", "down"


@dataclass
class Calibration:
    """What the experts of one module do differently while a model is quantized."""

    share: float  # of the tokens that even routing gives an expert, it sees at least so many
    routed: deque[Tensor]  # per batch: the tokens routed to each expert, [E]


@dataclass
class Layout:
    """How a module's experts are laid out, kept on the module once they are parted."""

    count: int
    names: dict[str, str]  # part → name of the linear in an expert; "" if the expert is the linear
    container: str  # where the experts lie, relative to the module
    interleaved: bool
    calibration: Calibration | None = field(default=None, repr=False)


def find_unfused(model: nn.Module) -> dict[str, nn.Module]:
    """Give the modules whose experts were parted by their dotted names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, UnfusedExperts)}


@contextmanager
def calibrating(model: nn.Module, share: float, batches: int) -> Iterator[None]:
    """Let every expert see enough tokens, and count those that are routed to it.

    An expert that gets less than ``share`` of the tokens that even routing would give it, in one
    batch, also reads tokens of other experts; what it makes of these goes nowhere.  So its Hessian
    is blended with that of the whole block, and no output changes.

    :param batches: calls of a block that make one run over all data; of so many, the last, the
        routed tokens are kept
    """
    modules = find_unfused(model).values()
    for module in modules:
        layout_of(module).calibration = Calibration(share, deque(maxlen=batches))
    try:
        yield
    finally:
        for module in modules:
            layout_of(module).calibration = None


# Of the batch that a thread runs while calibrating: [B, T] bool, False where padded.
_real: ContextVar[Tensor | None] = ContextVar("real_tokens", default=None)


@contextmanager
def without_padding(keep: Tensor | None) -> Iterator[None]:
    """Keep padding away from experts: they see rows of which nobody can say whose they are.

    :param keep: [B, T] bool, False where the batch that this thread runs is padded; None if nowhere
    """
    token = _real.set(keep)
    try:
        yield
    finally:
        _real.reset(token)


def _real_of(tokens: int) -> Tensor | None:
    """Give the mask of real tokens, [T], if some are not and the mask is of these tokens."""
    keep = _real.get()
    return None if keep is None or keep.numel() != tokens else keep.flatten()


def routed_tokens(module: nn.Module) -> list[int] | None:
    """Give how many tokens the router gave each expert, while calibrating."""
    calibration = layout_of(module).calibration
    if calibration is None or not calibration.routed:
        return None
    return [int(count) for count in torch.stack(list(calibration.routed)).sum(0)]


class UnfusedExperts(nn.Module):
    """Added in front of a model's own class of experts once these have been parted."""

    _auto_gptq_layout: Layout
    _auto_gptq_grouped: GroupedExperts | None = None  # what was found when last laid together
    _auto_gptq_apart: str | None = None  # why that could not be

    def experts(self) -> list[nn.Module]:
        """Give the modules of the experts, in order."""
        layout = self._auto_gptq_layout
        container = self.get_submodule(layout.container)
        return [container.get_submodule(str(i)) for i in range(layout.count)]

    def grouped(self) -> GroupedExperts | None:
        """Give the experts' products of all rows, laid together in memory; None if they stay apart.

        :meth:`explain` says why they do.
        """
        found = self._auto_gptq_grouped
        if found is None or not found.is_current():
            self._auto_gptq_grouped = found = self._group()
        return found

    def explain(self) -> str:
        """Say whether one product serves all experts, or why each linear is called by itself."""
        if self.grouped() is not None:
            return "grouped: one product of a projection serves all experts"
        return f"one by one: {self._auto_gptq_apart}"

    def _group(self) -> GroupedExperts | None:
        layout = self._auto_gptq_layout
        container = self.get_submodule(layout.container)

        def column(name: str) -> list[Place]:
            numbers = range(layout.count)
            if not name:
                return [Place(i, container, str(i)) for i in numbers]
            return [Place(i, container.get_submodule(str(i)), name) for i in numbers]

        found = group(
            {parts: [column(layout.names[p]) for p in parts] for parts in _steps_of(layout)}
        )
        if isinstance(found, GroupedExperts):
            return found
        if found != self._auto_gptq_apart:
            logger.info("Experts run one by one: %s.", found)
        self._auto_gptq_apart = found
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnfusedExperts:
        """Move with the model; what was laid together does not keep the old memory."""
        self._auto_gptq_grouped = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_auto_gptq_grouped": None}

    def run(self, tokens: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Give the outputs of ``tokens[rows]``, rows ``[S, H]`` that are sorted by expert.

        Rows behind those of the last expert come out as 0.

        :param tokens: [T, H]; while calibrating, an expert reads some of these besides its own
        :param rows: [S] int32
        :param offsets: where each expert's rows begin and the last one's end, [E + 1] int32
        """
        calibration = self._auto_gptq_layout.calibration
        needs_gradient = torch.is_grad_enabled() and tokens.requires_grad
        if calibration is None and not needs_gradient and _is_narrow(tokens):
            grouped = self.grouped()
            if grouped is not None:

                def project(parts: tuple[str, ...], x: Tensor) -> Tensor:
                    return grouped.project(parts, x, rows if x is tokens else None, offsets)

                return self._compute(project, tokens)
        index = rows.to(torch.long)
        if calibration is None and not needs_gradient and _can_group(self.experts()):
            return self._compute(partial(self._project_packed, offsets[1:]), tokens[index])
        sizes = offsets.diff().to(torch.long)
        if sizes.is_meta:  # only traced
            sizes = torch.full(sizes.shape, len(index) // len(sizes), device="cpu")
        if calibration is not None:
            calibration.routed.append(sizes.cpu())
            return self._run_with_more(tokens, index, sizes.tolist(), calibration.share)
        parted = tokens[index]
        outputs = [
            self._compute(partial(self._project, expert), part)
            for expert, part in self._parts(parted, sizes.tolist())
            if len(part)
        ]
        return _padded(outputs, parted)

    def _run_with_more(
        self, tokens: Tensor, index: Tensor, sizes: list[int], share: float
    ) -> Tensor:
        """Do the same with all experts, of which each reads its least number of tokens."""
        fair = sum(sizes) / len(sizes)
        least = math.ceil(share * fair)
        keep = _real_of(len(tokens))
        pool = (
            torch.arange(len(tokens), device=index.device) if keep is None else keep.nonzero()[:, 0]
        )
        outputs = []
        for i, (expert, own) in enumerate(self._parts(index, sizes)):
            missing = least - len(own)
            if share * fair >= len(tokens):  # the very same tensor for all: they share one Hessian
                outputs.append(self._compute(partial(self._project, expert), tokens)[own])
                continue
            read = own
            if missing > 0:  # evenly over the batch, other ones for each expert
                spread = torch.arange(missing, device=own.device) * len(pool) // missing
                read = torch.cat([own, pool[(spread + i) % len(pool)]])
            output = self._compute(partial(self._project, expert), tokens[read])
            outputs.append(output[: len(own)])
        return _padded(outputs, tokens[index])

    def _parts(self, rows: Tensor, sizes: list[int]) -> Iterator[tuple[nn.Module, Tensor]]:
        return zip(self.experts(), rows[: sum(sizes)].split(sizes), strict=True)

    def _project(self, expert: nn.Module, parts: tuple[str, ...], x: Tensor) -> Tensor:
        names = self._auto_gptq_layout.names
        return _joined([expert.get_submodule(names[part])(x) for part in parts])

    def _project_packed(self, ends: Tensor, parts: tuple[str, ...], x: Tensor) -> Tensor:
        return _joined([self._project_packed_part(ends, part, x) for part in parts])

    def _project_packed_part(self, ends: Tensor, part: str, x: Tensor) -> Tensor:
        name = self._auto_gptq_layout.names[part]
        layers: list[Any] = [expert.get_submodule(name) for expert in self.experts()]
        result: Tensor = torch.ops.auto_gptq.q_linear_experts(
            x,
            ends,
            [layer.qweight for layer in layers],
            [layer.qzeros for layer in layers],
            [layer.scales for layer in layers],
            [layer.g_idx for layer in layers],
            layers[0].bits,
            layers[0].zero_offset,
        )
        if layers[0].bias is None:
            return result
        biases = [layer.bias for layer in layers] + [torch.zeros_like(layers[0].bias)]
        rows = torch.arange(len(x), dtype=ends.dtype, device=x.device)
        expert = torch.bucketize(rows, ends, right=True)
        return result + torch.stack(biases)[expert].to(result.dtype)

    def _compute(self, project: Callable[[tuple[str, ...], Tensor], Tensor], x: Tensor) -> Tensor:
        """Give what experts make of ``x``; ``project`` calls linears, side by side."""
        layout = self._auto_gptq_layout
        module: Any = self
        *first, last = _steps_of(layout)
        if not first:  # a single linear
            return project(last, x)
        made = project(first[0], x)
        if len(first[0]) == 1:
            hidden = _activation(module)(made)
        elif hasattr(module, "_apply_gate"):
            if layout.interleaved:
                made = made.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            hidden = module._apply_gate(made)
        else:
            gate, up = made.chunk(2, -1)
            hidden = _activation(module)(gate) * up
        output = project(last, hidden)
        if getattr(module, "has_post_expert_norm", False):
            output = module.post_expert_norm(output)
        return output


class RoutedExperts(UnfusedExperts):
    """Experts called with all tokens and, for each, the experts it goes to and their weights."""

    def forward(
        self,
        hidden_states: Tensor,  # [..., H]
        top_k_index: Tensor,  # [T, k]; what is not below the number of experts goes to none
        top_k_weights: Tensor,  # [T, k]
    ) -> Tensor:  # [..., H]
        """Send every token through its experts and add their weighted outputs."""
        layout = self._auto_gptq_layout
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        keep = None if layout.calibration is None else _real_of(len(tokens))
        if keep is not None:
            top_k_index = torch.where(keep[:, None], top_k_index, layout.count)
        rows, places, offsets = torch.ops.auto_gptq.sort_by_expert(top_k_index, layout.count)
        outputs = self.run(tokens, rows, offsets)
        if hasattr(self, "identity_expert"):  # LongCat's experts that do nothing
            is_nobodys = torch.arange(len(outputs), device=outputs.device) >= offsets[-1]
            outputs = torch.where(is_nobodys[:, None], tokens[rows.to(torch.long)], outputs)
        summed: Tensor = torch.ops.auto_gptq.combine_experts(outputs, places, top_k_weights)
        return summed.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)


class BatchedExperts(UnfusedExperts):
    """Llama 4's: called with every token once per expert, 0 where it is not for that expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # [E * T, H] → [E * T, H]
        """Run each expert on the tokens that are not 0; without biases 0 gives 0."""
        layout = self._auto_gptq_layout
        is_real = hidden_states.any(-1)
        keep = None if layout.calibration is None else _real_of(len(is_real) // layout.count)
        if keep is not None:
            is_real &= keep.repeat(layout.count)
        rows = hidden_states[is_real]
        outputs = self.run(rows, *_in_order(rows, is_real.view(layout.count, -1).sum(1)))
        return torch.zeros_like(hidden_states).index_copy_(0, is_real.nonzero()[:, 0], outputs)


class SplitExperts(UnfusedExperts):
    """JetMoe's: one projection, called with rows sorted by expert and their numbers."""

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Run each expert on its rows."""
        sizes = torch.tensor(expert_size, device=inputs.device)
        return self.run(inputs, *_in_order(inputs, sizes))


def _in_order(tokens: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Give the rows and the offsets of tokens that are sorted by expert already."""
    rows = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
    return rows, nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)


def _steps_of(layout: Layout) -> list[tuple[str, ...]]:
    """Give an expert's parts in the order they run, together those that read the same input."""
    first = tuple(part for part in (GATE, UP) if part in layout.names)
    return [first, (DOWN,)] if first else [(DOWN,)]


def _is_narrow(x: Tensor) -> bool:
    """Tell whether grouped products take numbers of this type: on a GPU, 16 bits."""
    return not x.is_cuda or x.dtype in (torch.float16, torch.bfloat16)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _can_group(experts: Sequence[nn.Module]) -> bool:
    """Tell whether one call can run linears in the checkpoint's layout: alike, and not watched."""
    layers = [m for expert in experts for m in expert.modules() if not _is_container(m)]
    return all(type(m) is QuantLinear and not m.is_prepared for m in layers) and all(
        m.bits == layers[0].bits
        and m.zero_offset == layers[0].zero_offset
        and not (m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook"))
        for m in layers
    )


def _is_container(module: nn.Module) -> bool:
    return type(module) is nn.Module


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    if hasattr(module, "act_fn"):
        return module.act_fn  # type: ignore[no-any-return]
    return module.mlp.activation_fn  # type: ignore[no-any-return]


def _padded(outputs: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Join the experts' outputs, and put 0 behind them for rows that no expert has."""
    if not outputs:
        return torch.zeros_like(rows)
    joined = torch.cat(list(outputs))
    missing = len(rows) - len(joined)
    return nn.functional.pad(joined, (0, 0, 0, missing)) if missing else joined


def layout_of(module: nn.Module) -> Layout:
    layout: Layout = module._auto_gptq_layout  # type: ignore[assignment]
    return layout


_ = ops, expert_ops  # importing them defines the operators
