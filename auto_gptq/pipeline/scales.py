"""Tune all scales of a quantized model together, for the full-precision model's logits.

Blocks are quantized one after another, each for its own outputs; what becomes of the next token no
block sees.  So at the end the scales, and they alone, learn the full-precision model's
probabilities.  (EfficientQAT's second phase, arXiv 2407.11062 section 3.3, learns the text.)  That
model is gone by then, but its last hidden states are at hand, and they give its logits.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration.activations import Activations
from ..calibration.capture import after_blocks, forwards_replaced
from ..calibration.examples import Batch, model_inputs
from ..calibration.memory import free_bytes
from ..formats.gptq import unpack_codes, unpack_zeros
from ..nn_modules.qlinear.linear import QuantLinear
from ..nn_modules.surgery import replace
from ..quantization.precision import tensor_cores
from .placement import placed
from .tuning import BETAS, held_out, shuffled

logger = logging.getLogger(__name__)

_RATE = 1e-3  # step of Adam at the start, as a share of the scales; it falls to 0 by a cosine
_WARM_UP = 8  # steps
_TOKENS = 4096  # of a step, at most
_STEPS = 16  # of an epoch, at least, where there are rows enough
_FOR_ACTIVATIONS = 0.5  # of the free memory; the rest is for logits and gradients

_Make = Callable[[int, Any], Any]  # see forwards_replaced


def tune_scales(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    exact: Activations,  # the full-precision model's last hidden states, of the first batches
    outputs: int,  # of a block, see Captured.outputs
    device: torch.device,
    epochs: int,
) -> None:
    """Change the scales of every QuantLinear below the blocks, where that brings logits nearer.

    The whole model runs on the device, in bfloat16 on a GPU; of its activations only those between
    blocks are kept where memory is scarce.  Scales stay where the tuned ones are no better on the
    steps that are held out.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    with _scaled(model, layers) as tuned, placed(model, device, torch.float32):
        run = _Logits(model, blocks, list(_steps(batches, exact)), outputs, device)
        learnt, judged = held_out(len(run.steps))
        before = run.mean(judged)
        factors = [x.factors for x in tuned.values()]
        optimizer = torch.optim.Adam(factors, _RATE, betas=BETAS)
        total = epochs * len(learnt)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda i: min(1, (i + 1) / _WARM_UP) * (1 + math.cos(math.pi * i / total)) / 2,
        )
        for i in shuffled(learnt, epochs):
            optimizer.zero_grad()
            with torch.enable_grad():
                run.distance(i).backward()
            optimizer.step()
            rate.step()
        for x in tuned.values():
            x.finish()
        after = run.mean(judged)
    logger.info("Tuning the scales changed the divergence of logits from %g to %g.", before, after)
    if after < before:
        for name, layer in layers.items():
            layer.scales.copy_(tuned[name].scales.t())


class _Logits:
    """Runs the model on parts of the batches."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        steps: list[tuple[Batch, Tensor]],
        outputs: int,
        device: torch.device,
    ) -> None:
        self.steps = steps
        self._model, self._blocks, self._outputs, self._device = model, blocks, outputs, device
        self._in_block = _checkpointed
        if self._kept_bytes(0) * len(blocks) < free_bytes(device) * _FOR_ACTIVATIONS:
            self._in_block = _plain  # a third of the time less, half of it on a GPU

    def distance(self, index: int) -> Tensor:
        """Give the mean divergence of the tokens' probabilities from the full-precision model's."""
        batch, hidden = self.steps[index]
        keep = batch.attention_mask.to(self._device, torch.bool)
        with torch.no_grad():
            wanted = after_blocks(self._model, self._blocks, batch, hidden, self._outputs)
            wanted = F.log_softmax(wanted.logits[keep].float(), -1)
        found = F.log_softmax(self._logits(batch, self._in_block)[keep].float(), -1)
        return F.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)

    @torch.no_grad()
    def mean(self, steps: Sequence[int]) -> float:
        """Give the mean divergence of some steps."""
        return float(torch.stack([self.distance(i) for i in steps]).mean())

    def _logits(self, batch: Batch, in_block: _Make) -> Tensor:
        with (
            forwards_replaced(self._blocks, in_block),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"),
        ):
            logits: Tensor = self._model(**model_inputs(self._model, batch, self._device)).logits
        return logits

    def _kept_bytes(self, step: int) -> int:
        """Run a step to see how much the last block keeps for its gradients."""
        last = self._blocks[-1]
        own = {x.untyped_storage().data_ptr() for x in (*last.parameters(), *last.buffers())}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        def last_noted(index: int, forward: Any) -> Any:
            if index < len(self._blocks) - 1:
                return _checkpointed(index, forward)

            def noting(*args: Any, **kwargs: Any) -> Any:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    return forward(*args, **kwargs)

            return noting

        with torch.enable_grad():
            self._logits(self.steps[step][0], last_noted)
        return sum(sizes.values())


class _Scaled(nn.Module):
    """A QuantLinear whose scales have factors that can be learnt."""

    codes: Tensor  # [N, G, size] less the zero points, inputs in the order of their groups
    scales: Tensor  # [N, G] fp32
    order: Tensor | None  # [K] of the inputs, where groups are scattered
    bias: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        bits, group = layer.bits, layer.g_idx.to(torch.long)
        zeros = unpack_zeros(layer.qzeros, bits, layer.zero_offset)  # [G, N]
        codes = unpack_codes(layer.qweight, bits) - zeros[group]  # [K, N]
        small = torch.int8 if bits < 8 else torch.int16
        order = torch.argsort(group, stable=True)
        groups, size = len(zeros), int(torch.bincount(group).max())
        codes = F.pad(codes[order].t().to(small), (0, groups * size - len(group)))
        self.register_buffer("codes", codes.reshape(-1, groups, size))
        self.register_buffer("scales", layer.scales.t().to(torch.float32).contiguous())
        self.register_buffer("order", None if torch.equal(group, group.sort()[0]) else order)
        self.register_buffer("bias", layer.bias)
        self.factors = nn.Parameter(torch.ones_like(self.scales))
        self._kept_as = layer.scales.dtype

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x if self.order is None else x[..., self.order]
        scales = self.scales * self.factors
        found: Tensor = _Product.apply(x, self.codes, scales)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias.to(x.dtype)

    @torch.no_grad()
    def finish(self) -> None:
        """Take the factors into the scales, as they are kept."""
        self.scales.copy_((self.scales * self.factors).to(self._kept_as))
        self.factors.fill_(1)


class _Product(torch.autograd.Function):
    """Multiply by codes times scales; weights are made twice and never kept.

    Left to autograd, a weight and its gradient took some sixteen kernels over all their numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, scales)
        return x @ _weight(codes, scales, x).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        x, codes, scales = ctx.saved_tensors
        gradient = gradients[0]
        of_x = gradient @ _weight(codes, scales, x)
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        of_weight = F.pad(of_weight, (0, codes[0].numel() - x.shape[-1])).view_as(codes)
        return of_x, None, (of_weight * codes).sum(-1, dtype=torch.float32)


def _weight(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:  # [N, K]
    """Multiply in fp32, whatever the result is rounded to."""
    weight = torch.empty(codes.shape, dtype=x.dtype, device=x.device)
    torch.mul(codes, scales[..., None], out=weight)
    return weight.flatten(1)[:, : x.shape[-1]]


@contextmanager
def _scaled(model: nn.Module, layers: dict[str, QuantLinear]) -> Iterator[dict[str, _Scaled]]:
    """Have layers in the places of others whose factors, and nothing else, take gradients."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned = {name: _Scaled(layer) for name, layer in layers.items()}
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        replace(model, tuned.items())
        with tensor_cores():
            yield tuned
    finally:
        replace(model, layers.items())
        for parameter in asked:
            parameter.requires_grad_(True)


def _steps(batches: Sequence[Batch], exact: Activations) -> Iterator[tuple[Batch, Tensor]]:
    """Part the batches that have exact states into rows of so many tokens together."""
    total = sum(batch.input_ids.numel() for batch in batches[: len(exact)])
    tokens = min(_TOKENS, total // _STEPS)
    for batch, hidden in zip(batches, exact, strict=False):
        rows = len(batch.input_ids)
        at_once = rows if batch.others else max(1, tokens // batch.input_ids.shape[1])
        for part in (slice(i, i + at_once) for i in range(0, rows, at_once)):
            ids, mask = batch.input_ids[part], batch.attention_mask[part]
            yield Batch(ids, mask, batch.others), hidden[part].to(torch.float32)


def _plain(_index: int, forward: Any) -> Any:
    return forward


def _checkpointed(_index: int, forward: Any) -> Any:
    return functools.partial(checkpoint, forward, use_reentrant=False)
