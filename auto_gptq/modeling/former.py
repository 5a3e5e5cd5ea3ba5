"""Methods of AutoGPTQ's models that have little or nothing left to do."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn_modules.qlinear.linear import QuantLinear
from ..nn_modules.qlinear.variants import GeneralQuantLinear
from ..nn_modules.surgery import replace
from .options import note_meaningless


class FormerMethods(nn.Module):
    """What scripts still call on a wrapper with a ``model``."""

    model: Any

    def warmup_triton(self, enabled: bool = True) -> None:
        """Do nothing: there is nothing to tune before a kernel runs."""
        note_meaningless({"warmup_triton": enabled})

    def enable_trainable_mode(self, enabled: bool = True) -> None:
        """Set ``trainable`` on every module that has it; gradients flow through either way."""
        layer: Any
        for layer in self.model.modules():
            if hasattr(layer, "trainable"):
                layer.trainable = enabled

    def disable_trainable_mode(self) -> None:
        """Take ``trainable`` back."""
        self.enable_trainable_mode(enabled=False)

    @staticmethod
    def make_sure_compatible_with_peft(
        model: nn.Module,
        use_triton: bool,
        desc_act: bool,
        group_size: int,
        bits: int,
        disable_exllama: bool = True,
        disable_exllamav2: bool = False,
        use_marlin: bool = False,
        use_qigen: bool = False,
        use_tritonv2: bool = False,
    ) -> None:
        """Replace quantized layers by GeneralQuantLinear, as AutoGPTQ did.

        Not needed for PEFT, which takes every QuantLinear for the ``nn.Linear`` that it is.
        """
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]
        replace(model, [(name, GeneralQuantLinear(layer)) for name, layer in found])
