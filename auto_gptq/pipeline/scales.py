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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration.activations import Activations
from ..calibration.capture import after_blocks, forwards_replaced
from ..calibration.examples import Batch, model_inputs
from ..formats.gptq import unpack_codes, unpack_zeros
from ..nn_modules.qlinear.linear import QuantLinear
from ..nn_modules.surgery import replace
from ..quantization.precision import tensor_cores
from .placement import placed
from .tuning import BETAS, held_out, inputs_together, shuffled, spread

logger = logging.getLogger(__name__)

_RATE = 1e-3  # step of Adam at the start, as a share of the scales; it falls to 0 by a cosine
_WARM_UP = 8  # steps
_TOKENS = 4096  # of a step


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
    blocks are kept.  Scales stay where the tuned ones are no better on the steps that are held out.
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

    def distance(self, index: int) -> Tensor:
        """Give the mean divergence of the tokens' probabilities from the full-precision model's."""
        batch, hidden = self.steps[index]
        keep = batch.attention_mask.to(self._device, torch.bool)
        with torch.no_grad():
            wanted = after_blocks(self._model, self._blocks, batch, hidden, self._outputs)
            wanted = F.log_softmax(wanted.logits[keep].float(), -1)
        with (
            forwards_replaced(self._blocks, _checkpointed),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"),
        ):
            found = self._model(**model_inputs(self._model, batch, self._device)).logits
        found = F.log_softmax(found[keep].float(), -1)
        return F.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)

    @torch.no_grad()
    def mean(self, steps: Sequence[int]) -> float:
        """Give the mean divergence of some steps."""
        return float(torch.stack([self.distance(i) for i in steps]).mean())


class _Scaled(nn.Module):
    """A QuantLinear whose scales have factors that can be learnt."""

    codes: Tensor  # [N, K] less the zero points
    scales: Tensor  # [N, G] fp32
    group: Tensor  # [K]
    bias: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        bits, group = layer.bits, layer.g_idx.to(torch.long)
        zeros = unpack_zeros(layer.qzeros, bits, layer.zero_offset)  # [G, N]
        codes = unpack_codes(layer.qweight, bits) - zeros[group]  # [K, N]
        small = torch.int8 if bits < 8 else torch.int16
        self.register_buffer("codes", codes.t().to(small).contiguous())
        self.register_buffer("scales", layer.scales.t().to(torch.float32).contiguous())
        self.register_buffer("group", group)
        self._together = inputs_together(layer.g_idx)
        self.register_buffer("bias", layer.bias)
        self.factors = nn.Parameter(torch.ones_like(self.scales))
        self._kept_as = layer.scales.dtype

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes * spread(self.scales * self.factors, self.group, self._together)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @torch.no_grad()
    def finish(self) -> None:
        """Take the factors into the scales, as they are kept."""
        self.scales.copy_((self.scales * self.factors).to(self._kept_as))
        self.factors.fill_(1)


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
    for batch, hidden in zip(batches, exact, strict=False):
        rows = len(batch.input_ids)
        at_once = rows if batch.others else max(1, _TOKENS // batch.input_ids.shape[1])
        for part in (slice(i, i + at_once) for i in range(0, rows, at_once)):
            ids, mask = batch.input_ids[part], batch.attention_mask[part]
            yield Batch(ids, mask, batch.others), hidden[part].to(torch.float32)


def _checkpointed(_index: int, forward: object) -> object:
    return functools.partial(checkpoint, forward, use_reentrant=False)
