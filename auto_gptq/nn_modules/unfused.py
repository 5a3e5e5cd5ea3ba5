"""Experts that are modules of their own: how they run, while calibrating and packed.

While a model is quantized each linear is called by itself.  Once all are packed, one call of an
operator runs a projection of all experts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from .qlinear.linear import QuantLinear

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


def routed_tokens(module: nn.Module) -> list[int] | None:
    """Give how many tokens the router gave each expert, while calibrating."""
    calibration = layout_of(module).calibration
    if calibration is None or not calibration.routed:
        return None
    return [int(count) for count in torch.stack(list(calibration.routed)).sum(0)]


class UnfusedExperts(nn.Module):
    """Added in front of a model's own class of experts once these have been parted."""

    _auto_gptq_layout: Layout

    def experts(self) -> list[nn.Module]:
        """Give the modules of the experts, in order."""
        layout = self._auto_gptq_layout
        container = self.get_submodule(layout.container)
        return [container.get_submodule(str(i)) for i in range(layout.count)]

    def run(self, tokens: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
        """Give the outputs of ``tokens[index]``, rows ``[S, H]`` that are sorted by expert.

        Rows behind those of the last expert come out as 0.

        :param tokens: [T, H]; while calibrating, an expert reads some of these besides its own
        :param sizes: rows of each expert, [E] int64
        """
        calibration = self._auto_gptq_layout.calibration
        if calibration is not None:
            calibration.routed.append(sizes.cpu())
            return self._run_with_more(tokens, index, sizes.tolist(), calibration.share)
        rows = tokens[index]
        if _can_group(self.experts(), rows):
            return self._compute(partial(self._project_grouped, sizes.cumsum(0)), rows)
        outputs = [
            self._compute(partial(self._project, expert), part)
            for expert, part in self._parts(rows, sizes.tolist())
            if len(part)
        ]
        return _padded(outputs, rows)

    def _run_with_more(
        self, tokens: Tensor, index: Tensor, sizes: list[int], share: float
    ) -> Tensor:
        """Do the same with all experts, of which each reads its least number of tokens."""
        least = min(len(tokens), math.ceil(share * sum(sizes) / len(sizes)))
        outputs = []
        for i, (expert, own) in enumerate(self._parts(index, sizes)):
            missing = least - len(own)
            if least == len(tokens):  # the very same tensor for all: they share one Hessian
                outputs.append(self._compute(partial(self._project, expert), tokens)[own])
                continue
            read = own
            if missing > 0:  # evenly over the batch, other ones for each expert
                spread = torch.arange(missing, device=own.device) * len(tokens) // missing
                read = torch.cat([own, (spread + i) % len(tokens)])
            output = self._compute(partial(self._project, expert), tokens[read])
            outputs.append(output[: len(own)])
        return _padded(outputs, tokens[index])

    def _parts(self, rows: Tensor, sizes: list[int]) -> Iterator[tuple[nn.Module, Tensor]]:
        return zip(self.experts(), rows[: sum(sizes)].split(sizes), strict=True)

    def _project(self, expert: nn.Module, part: str, x: Tensor) -> Tensor:
        result: Tensor = expert.get_submodule(self._auto_gptq_layout.names[part])(x)
        return result

    def _project_grouped(self, offsets: Tensor, part: str, x: Tensor) -> Tensor:
        name = self._auto_gptq_layout.names[part]
        layers: list[Any] = [expert.get_submodule(name) for expert in self.experts()]
        result: Tensor = torch.ops.auto_gptq.q_linear_experts(
            x,
            offsets,
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
        rows = torch.arange(len(x), device=x.device)
        expert = torch.bucketize(rows, offsets, right=True)
        return result + torch.stack(biases)[expert].to(result.dtype)

    def _compute(self, project: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """Give what an expert makes of ``x``, its linears being called by ``project``."""
        layout = self._auto_gptq_layout
        module: Any = self
        if GATE not in layout.names and UP not in layout.names:  # a single linear
            return project(DOWN, x)
        if GATE in layout.names:
            gate, up = project(GATE, x), project(UP, x)
            if hasattr(module, "_apply_gate"):
                pair = (gate, up)
                both = (
                    torch.stack(pair, -1).flatten(-2) if layout.interleaved else torch.cat(pair, -1)
                )
                hidden = module._apply_gate(both)
            else:
                hidden = _activation(module)(gate) * up
        else:
            hidden = _activation(module)(project(UP, x))
        output = project(DOWN, hidden)
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
        chosen = top_k_index.reshape(-1)
        expert, order = torch.sort(chosen, stable=True)
        sizes = (chosen[:, None] == torch.arange(layout.count, device=chosen.device)).sum(0)
        index = order // top_k_index.shape[-1]
        outputs = self.run(tokens, index, sizes)
        if hasattr(self, "identity_expert"):  # LongCat's experts that do nothing
            outputs = torch.where((expert >= layout.count)[:, None], tokens[index], outputs)
        weighted = outputs * top_k_weights.reshape(-1)[order, None]
        unsorted = torch.empty_like(weighted).index_copy_(0, order, weighted)
        summed = unsorted.view(len(tokens), -1, unsorted.shape[-1]).sum(1)
        return summed.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)


class BatchedExperts(UnfusedExperts):
    """Llama 4's: called with every token once per expert, 0 where it is not for that expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # [E * T, H] → [E * T, H]
        """Run each expert on the tokens that are not 0; without biases 0 gives 0."""
        layout = self._auto_gptq_layout
        is_real = hidden_states.any(-1)
        sizes = is_real.view(layout.count, -1).sum(1)
        rows = hidden_states[is_real]
        outputs = self.run(rows, torch.arange(len(rows), device=rows.device), sizes)
        return torch.zeros_like(hidden_states).index_copy_(0, is_real.nonzero()[:, 0], outputs)


class SplitExperts(UnfusedExperts):
    """JetMoe's: one projection, called with rows sorted by expert and their numbers."""

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Run each expert on its rows."""
        sizes = torch.tensor(expert_size, device=inputs.device)
        return self.run(inputs, torch.arange(len(inputs), device=inputs.device), sizes)


def _can_group(experts: Sequence[nn.Module], x: Tensor) -> bool:
    """Tell whether one call can run the experts' linears: packed alike, and nobody watches."""
    if torch.is_grad_enabled() and x.requires_grad:
        return False  # the single linears know their gradient
    layers = [m for expert in experts for m in expert.modules() if not _is_container(m)]
    return all(type(m) is QuantLinear for m in layers) and all(
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


_ = ops  # importing it defines the operators
