"""AutoGPTQ's kernel classes: one row each, all of them the same QuantLinear.

AutoGPTQ chose a kernel by choosing a class, called ``QuantLinear`` in every file. Here any
QuantLinear finds its kernel when it runs, so the classes differ in name, in the arguments they
take and in how ``pack`` is called.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .linear import QuantLinear

_FIRST = ("bits", "group_size", "infeatures", "outfeatures", "bias")


@dataclass(frozen=True)
class Variant:
    """What an old kernel class was called and what its constructor took after the bias."""

    name: str  # its alias in AutoGPTQ's peft_utils
    file: str
    quant_type: str
    arguments: tuple[str, ...]  # positional ones after the bias, in order
    half_scales: bool = False  # whatever the dtype of the weights was


VARIANTS = (
    Variant(
        "QuantLinearCuda",
        "qlinear_cuda",
        "cuda",
        ("kernel_switch_threshold", "trainable", "weight_dtype"),
    ),
    Variant(
        "QuantLinearCudaOld",
        "qlinear_cuda_old",
        "cuda-old",
        ("use_cuda_fp16", "kernel_switch_threshold", "trainable", "weight_dtype"),
    ),
    Variant("QuantLinearExllama", "qlinear_exllama", "exllama", ("trainable",), True),
    Variant("QuantLinearExllamaV2", "qlinear_exllamav2", "exllamav2", ("trainable",), True),
    Variant("QuantLinearMarlin", "qlinear_marlin", "marlin", ("trainable",), True),
    Variant("QuantLinearTriton", "qlinear_triton", "triton", ("trainable",), True),
    Variant("QuantLinearTritonV2", "qlinear_tritonv2", "tritonv2", ("trainable",), True),
)
# What AutoGPTQ's constructors took beside the arguments of QuantLinear, with its defaults.
_DEFAULTS = {
    "kernel_switch_threshold": 128,
    "use_cuda_fp16": True,
    "trainable": False,
    "weight_dtype": torch.float16,
}


class TritonModuleMixin:
    """Has the method by which AutoGPTQ tuned its Triton kernels."""

    @classmethod
    def warmup(cls, model: nn.Module, transpose: bool = False, seqlen: int = 2048) -> None:
        """Do nothing: there is nothing to tune before a kernel runs."""


class _OneKind(type):
    """Makes every QuantLinear an instance of each variant.

    Tools ask for a class by flags and then look for its instances in a model that was loaded with
    other flags, or with none.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, QuantLinear)


class OldQuantLinear(QuantLinear, TritonModuleMixin, metaclass=_OneKind):
    """A QuantLinear with the constructor and the attributes of one of AutoGPTQ's classes."""

    variant: Variant
    device: torch.device | None = None  # set by make_quant and by optimum; a note, no more

    def __init__(
        self,
        bits: int,
        group_size: int,
        infeatures: int,
        outfeatures: int,
        bias: bool,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if len(args) > len(self.variant.arguments):
            raise TypeError(
                f"{self.variant.file}.QuantLinear takes {len(_FIRST + self.variant.arguments)} "
                f"arguments, {', '.join(_FIRST + self.variant.arguments)}; {len(args)} were given "
                "after the bias."
            )
        given: dict[str, Any] = (
            _DEFAULTS | kwargs | dict(zip(self.variant.arguments, args, strict=False))
        )
        if self.variant.half_scales:
            given["weight_dtype"] = torch.float16
        super().__init__(bits, group_size, infeatures, outfeatures, bias, **given)
        self.kernel_switch_threshold = given["kernel_switch_threshold"]
        self.use_cuda_fp16 = given["use_cuda_fp16"]
        self.half_indim = infeatures // 2
        self.autogptq_cuda_available = False

    def pack(
        self,
        linear: nn.Module,
        scales: Tensor,  # [N, G]
        zeros: Tensor | None = None,  # [N, G], of any dtype; the middle code if None
        g_idx: Tensor | None = None,  # [K]
    ) -> None:
        """Pack a fake-quantized layer."""
        if zeros is None:  # Marlin's call
            zeros = torch.full_like(scales, (self.maxq + 1) // 2)
        super().pack(linear, scales, zeros, g_idx)

    def post_init(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing: kernels need no preparation."""


class GeneralQuantLinear(QuantLinear):
    """Another module object over the tensors of an existing quantized layer."""

    def __init__(self, quant_linear_module: QuantLinear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(
            {name: value for name, value in vars(quant_linear_module).items() if name[0] != "_"}
        )
        transient = quant_linear_module._non_persistent_buffers_set
        for name, buffer in quant_linear_module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in transient)
        self.train(quant_linear_module.training)


def _make(variant: Variant) -> type[OldQuantLinear]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in _FIRST]
    parameters += [
        inspect.Parameter(name, kind, default=_DEFAULTS[name]) for name in variant.arguments
    ]
    parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    attributes = {
        "__doc__": f"AutoGPTQ's {variant.quant_type} layer.",
        # Where AutoGPTQ had it, so that pickles of either find the class.
        "__module__": f"auto_gptq.nn_modules.qlinear.{variant.file}",
        "__signature__": inspect.Signature(parameters),
        "QUANT_TYPE": variant.quant_type,
        "variant": variant,
    }
    return _OneKind("QuantLinear", (OldQuantLinear,), attributes)  # type: ignore[return-value]


CLASSES: dict[str, type[OldQuantLinear]] = {row.quant_type: _make(row) for row in VARIANTS}
globals().update({row.name: CLASSES[row.quant_type] for row in VARIANTS})
