"""Methods of AutoGPTQ's models that have little or nothing to do, or are other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..nn_modules.qlinear.linear import QuantLinear
from ..nn_modules.qlinear.variants import GeneralQuantLinear
from ..nn_modules.surgery import replace
from .options import note_meaningless


class FormerMethods(nn.Module):
    """What scripts still call on a wrapper with a ``model``."""

    model: Any
    save_quantized: Any

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

    def save_pretrained(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Do what ``save_quantized`` does, under transformers' name.

        Of its other arguments only ``max_shard_size`` and ``checkpoint_format`` mean anything.
        """
        known = {k: kwargs[k] for k in ("max_shard_size", "checkpoint_format") if k in kwargs}
        self.save_quantized(save_dir, use_safetensors, safetensors_metadata, **known)

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
