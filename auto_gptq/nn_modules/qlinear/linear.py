"""``QuantLinear``: a linear layer whose weight is stored as packed integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, DerivedWeightError, ModuleShapeError
from ...formats.gptq import ZERO_OFFSET, GPTQTensors, group_count, pack_layer, trivial_g_idx
from ...formats.packing import CODES_PER_STREAM
from ...kernels import native, ops
from ...quantization.config import check_bits_and_groups
from .derived import HOW, DerivedWeight
from .prepared import PACKED, TILED, PackedWeight


class QuantLinear(PackedWeight, nn.Linear):
    """A linear layer over packed weights; it gives the checkpoint's tensors, bit for bit.

    It is an ``nn.Linear`` for whoever asks, but ``weight`` is derived: reading it dequantizes,
    writing it raises.

    :raises ModuleShapeError: if the features are not multiples of 32
    """

    QUANT_TYPE = "gptq"
    # Whether a CPU may round x to 8 bits where it has more than a few rows: faster, less exact.
    int8_activations = False

    def __init__(
        self,
        bits: int,
        group_size: int,
        infeatures: int,
        outfeatures: int,
        bias: bool,
        trainable: bool = False,
        weight_dtype: torch.dtype = torch.float16,
        checkpoint_format: str = "gptq",
        **_kwargs: Any,
    ) -> None:
        check_bits_and_groups(bits, group_size)
        check_shape("QuantLinear", infeatures, outfeatures, group_size)
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        self.bits = bits
        self.group_size = infeatures if group_size == -1 else group_size
        self.in_features = self.infeatures = infeatures
        self.out_features = self.outfeatures = outfeatures
        self.maxq = (1 << bits) - 1
        self.trainable = trainable
        self.zero_offset = ZERO_OFFSET[checkpoint_format]
        groups = group_count(infeatures, self.group_size)
        words = bits, CODES_PER_STREAM
        self.register_buffer(
            "qweight",
            torch.zeros(infeatures // words[1] * words[0], outfeatures, dtype=torch.int32),
        )
        self.register_buffer(
            "qzeros", torch.zeros(groups, outfeatures // words[1] * words[0], dtype=torch.int32)
        )
        self.register_buffer("scales", torch.zeros(groups, outfeatures, dtype=weight_dtype))
        self.register_buffer("g_idx", trivial_g_idx(infeatures, self.group_size))
        self.register_buffer("bias", torch.zeros(outfeatures, dtype=weight_dtype) if bias else None)
        native.load()

    @property
    def weight(self) -> Tensor:  # a Parameter in nn.Linear
        """The dense weight ``[N, K]``, dequantized anew at each access; writing into it raises."""
        weight = self.dequantize(self.scales.dtype)
        # A compiled graph is traced from code that has run, and raised, without the compiler.
        return weight if torch.compiler.is_compiling() else weight.as_subclass(DerivedWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise DerivedWeightError(HOW)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a Parameter as weight, which ``nn.Module`` takes without asking the property."""
        if name == "weight":
            raise DerivedWeightError(HOW)
        super().register_parameter(name, param)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Give the dense weight ``[N, K]``, computed in fp32 and rounded once."""
        weight: Tensor
        if self.is_prepared:
            tiled = (self._buffers[name] for name in TILED)
            weight = torch.ops.auto_gptq.dequantize_tiles(*tiled, *self._settings(), dtype)
        else:
            packed = (self._buffers[name] for name in PACKED)
            weight = torch.ops.auto_gptq.dequantize(*packed, self.bits, self.zero_offset, dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x [..., K]``, in any float dtype, to ``[..., N]`` in the same dtype."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._multiply(x)
        # What keeps an operator's gradients is Python; a call that needs none goes past it.
        with torch._C._AutoDispatchBelowAutograd():
            return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        buffers = self._buffers
        output: Tensor
        if "tiles" in buffers:
            ops = torch.ops.auto_gptq
            product = ops.q_matmul_int8 if self.int8_activations else ops.q_matmul
            output = product(
                x,
                buffers["tiles"],
                buffers["tile_scales"],
                buffers["tile_zeros"],
                buffers["perm"],
                buffers["bias"],
                self.bits,
                self.group_size,
                self.in_features,
                self.out_features,
            )
        else:
            packed = (buffers[name] for name in PACKED)
            output = torch.ops.auto_gptq.q_linear(
                x, *packed, buffers["bias"], self.bits, self.zero_offset
            )
        return output

    def pack(
        self,
        linear: nn.Module,  # its weight holds values of the grid (fake-quantized)
        scales: Tensor,  # [N, G]
        zeros: Tensor,  # [N, G]
        g_idx: Tensor | None = None,  # [K]; contiguous groups if None
    ) -> None:
        """Pack a fake-quantized layer, finding each code again by rounding (AutoGPTQ's call).

        The solver's own integers go through :meth:`pack_codes`, which rounds nothing.
        """
        if g_idx is None:
            g_idx = trivial_g_idx(self.in_features, self.group_size)
        group = g_idx.to(scales.device, torch.long)
        weight = dense_weight(linear).to(scales.device, torch.float32)
        wide_scales, wide_zeros = scales.float()[:, group], zeros.float()[:, group]
        codes = torch.round(weight / wide_scales + wide_zeros).clamp(0, self.maxq)
        self.pack_codes(codes, scales, zeros, g_idx, getattr(linear, "bias", None))

    def pack_codes(
        self,
        codes: Tensor,  # [N, K]
        scales: Tensor,  # [N, G]
        zeros: Tensor,  # [N, G]
        g_idx: Tensor,  # [K]
        bias: Tensor | None = None,  # [N]
    ) -> None:
        """Take integers as they are."""
        packed = pack_layer(
            codes,
            scales,
            zeros,
            g_idx,
            bits=self.bits,
            checkpoint_format=self.checkpoint_format,
            scale_dtype=self.scales.dtype,
            qweight=torch.ops.auto_gptq.pack_codes(codes.to(torch.uint8), self.bits),
        )
        self.load_packed(packed, bias)

    def load_packed(self, packed: GPTQTensors, bias: Tensor | None = None) -> None:
        """Take packed tensors, which must have the shapes of the present ones."""
        self.restore()
        for name in PACKED:
            new, old = getattr(packed, name), getattr(self, name)
            if new.shape != old.shape:
                raise CheckpointError(
                    f"{name} has shape {list(new.shape)}; {self} needs {list(old.shape)}."
                )
            setattr(self, name, new)
        if self.bias is not None and bias is not None:
            self._buffers["bias"] = bias.detach().to(self.scales.dtype).clone()
        self._lay_out_again()

    @property
    def checkpoint_format(self) -> str:
        """The layout of ``qzeros``: "gptq" or "gptq_v2"."""
        return next(name for name, offset in ZERO_OFFSET.items() if offset == self.zero_offset)

    def check(self, name: str) -> None:
        """Look at the loaded values for what would make every output wrong.

        :param name: what to call the layer in the message
        :raises CheckpointError: on a group out of range, or a scale that is NaN or infinite
        """
        low, high = (int(x) for x in torch.aminmax(self.g_idx))
        if low < 0 or high >= self.scales.shape[0]:
            raise CheckpointError(
                f"{name}.g_idx names groups {low} to {high}, but there are "
                f"{self.scales.shape[0]} groups (0 to {self.scales.shape[0] - 1})."
            )
        if not torch.isfinite(self.scales).all():
            raise CheckpointError(
                f"{name}.scales holds NaN or infinity; the checkpoint is damaged."
            )

    def extra_repr(self) -> str:
        """Say the shape and the settings, as ``repr`` of a layer does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}"
        )


def check_shape(name: str, in_features: int, out_features: int, group_size: int) -> None:
    """Refuse a linear layer that the packed format cannot hold.

    :raises ModuleShapeError: naming the layer, its shape and the group size
    """
    shape = f"{name} maps {in_features} inputs to {out_features} outputs"
    if in_features % CODES_PER_STREAM or out_features % CODES_PER_STREAM:
        raise ModuleShapeError(
            f"{shape}; both must be multiples of {CODES_PER_STREAM} to be packed into int32 words."
        )
    if group_size > in_features:
        raise ModuleShapeError(
            f"{shape}, fewer inputs than one group of group_size={group_size}. "
            f"Choose a group_size of at most {in_features}, or -1 for one group per row."
        )


def dense_weight(linear: nn.Module) -> Tensor:
    """Give the weight of a Linear or Conv1D as ``[out_features, in_features]``."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    # GPT-2's Conv1D keeps [in, out]; it has `nf` where a Linear has `out_features`.
    return weight.t() if hasattr(linear, "nf") else weight


_ = ops  # importing it defines the operators
