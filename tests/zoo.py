"""A tiny random model of any type that transformers has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tiny import MOST, tiny_examples
from tests.zoo_sizes import VOCABULARY, tiny_config

TEXT, SENSES = "AutoModelForCausalLM", "AutoModelForMultimodalLM"


def tiny_of(
    model_type: str, dtype: torch.dtype = torch.float32, auto: str = TEXT, **extra: Any
) -> Any:
    """Build a random model of any type.

    :param auto: transformers' class that builds it
    """
    kind = getattr(transformers, auto)
    return kind.from_config(tiny_config(model_type, **extra), dtype=dtype).eval()


@dataclass(frozen=True)
class Trip:
    """What came of quantizing, saving and loading a tiny model of one type."""

    quantized: int  # linears packed
    dense: tuple[str, ...]  # names of linears of the blocks that stayed dense
    blocks: str
    experts: int  # linears of parted experts among the packed
    # Of logits, between the model loaded in one of two ways and the dequantized twin, as a share of
    # the largest logit; a text why it could not be loaded so.
    by_us: float
    by_transformers: float | str | None
    sighted: bool  # an image was among what it was calibrated and compared on
    # What the twin's logits differ by if the inputs of these linears are rounded to 15 bits, as CPU
    # kernels do: Gemma 4 divides attention scores by nothing and makes much of little.
    rounding: float

    def is_good(self, difference: float | str | None) -> bool:
        """Tell whether a difference is one of rounding."""
        return isinstance(difference, float) and difference <= max(MOST, 3 * self.rounding)


@torch.no_grad()
def round_trip(
    model_type: str, folder: Path, *, by_transformers: bool = False, auto: str = TEXT
) -> Trip:
    """Quantize a tiny model, save it, load it, and compare it with its dequantized twin.

    :param auto: transformers' class that builds the model; with ``SENSES`` it is calibrated, and
        compared, on an image as well if it takes one
    """
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from auto_gptq.modeling import BaseGPTQForCausalLM
    from auto_gptq.nn_modules.experts import expert_groups
    from auto_gptq.nn_modules.qlinear import QuantLinear
    from auto_gptq.nn_modules.surgery import dequantize, find_linears
    from auto_gptq.pipeline.discover import find_blocks

    torch.manual_seed(0)
    settings = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    model = tiny_of(model_type, auto=auto)
    seen = sighted(model) if auto == SENSES else None
    wrapper = BaseGPTQForCausalLM(model, False, settings)
    blocks = find_blocks(model)[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    examples = tiny_examples(4, 24, VOCABULARY - 8)
    if seen is not None:
        # Where each example needs an image, none is of text alone.
        examples = [seen, *examples] if _runs(model, examples[0]) else [seen, seen]
    wrapper.quantize(examples, batch_size=2, show_progress=False)
    wrapper.save_quantized(folder)
    loaded = AutoGPTQForCausalLM.from_quantized(folder, device="cpu").model
    made = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)} == made
    for name, parameter in loaded.named_parameters():
        if name in before:  # what is not quantized stays as it was, in every bit
            assert torch.equal(parameter, before[name]), name
    in_experts = {n for group in expert_groups(loaded).values() for n in group}
    dense = tuple(n for n in find_linears(loaded) if n.startswith(f"{blocks}."))
    inputs = {"input_ids": torch.arange(3, 3 + 24)[None]} if seen is None else seen
    dequantize(model, torch.float32)
    wanted = model(**inputs, use_cache=False).logits

    def difference(model: Any) -> float:
        found = model(**inputs, use_cache=False).logits
        return float((found - wanted).abs().max() / wanted.abs().max())

    theirs: float | str | None = None
    if by_transformers:
        try:
            theirs = difference(_load(type(model).__name__, auto, folder))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            theirs = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    in_experts &= made
    by_us = difference(loaded)
    rounding = _rounding(model, made, lambda: difference(model))
    return Trip(
        *(len(made), dense, blocks, len(in_experts), by_us, theirs), seen is not None, rounding
    )


def _rounding(model: Any, linears: Iterable[str], measure: Callable[[], float]) -> float:
    """Measure what comes of errors as large as those of rounding inputs to 15 bits."""

    def rounded(_linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        step = x.abs().amax(-1, keepdim=True) / 2**14
        return (x + step * (torch.rand_like(x) - 0.5), *args[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(rounded) for name in linears]
    try:
        return measure()
    finally:
        for hook in hooks:
            hook.remove()


def _load(class_name: str, auto: str, folder: Path) -> Any:
    """Load with transformers, by the class's own name where no automatic one knows the type."""
    for name in (auto, class_name):
        try:
            return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error) or name == class_name:
                raise


def sighted(model: Any) -> dict[str, Tensor] | None:
    """Give a row of tokens with an image as a processor returns it; None if that is not so easy.

    How many tokens an image takes is asked of the model itself; one that attends to images from
    beside the text needs none.
    """
    settings = getattr(model.config, "vision_config", None)
    base = getattr(model, "model", model)
    size = getattr(settings, "image_size", None)
    if not isinstance(size, int):
        return None
    pixels = {"pixel_values": torch.randn(1, getattr(settings, "num_channels", 3), size, size)}
    ids = torch.randint(3, VOCABULARY - 8, (1, 48))
    count = _tokens_of_image(base, pixels)
    for token in (getattr(model.config, "image_token_id", None), None):
        if token is not None:
            ids[0, 2 : 2 + count] = token
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        taken = inspect.signature(model.forward).parameters
        if token is not None and "token_type_ids" in taken:
            example["token_type_ids"] = (ids == token).long()
        if "qformer_input_ids" in taken:
            example["qformer_input_ids"] = ids
        if count < 40 and _runs(model, example):
            return example
        ids = torch.randint(3, VOCABULARY - 8, (1, 48))
    return None


def _tokens_of_image(base: Any, pixels: dict[str, Tensor]) -> int:
    try:
        features = base.get_image_features(**pixels)
        features = getattr(features, "pooler_output", features)
        parts = [features] if isinstance(features, Tensor) else list(features)
        return sum(part.numel() // part.shape[-1] for part in parts)
    except _MISFIT:
        return 0


def _runs(model: Any, example: dict[str, Tensor]) -> bool:
    rows = {key: value[None] if value.dim() == 1 else value for key, value in example.items()}
    try:
        model(**rows, use_cache=False)
    except _MISFIT:
        return False
    return True


_MISFIT = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)
