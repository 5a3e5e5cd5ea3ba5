"""The two classes that transformers asks for GPTQ: settings, and what happens around loading."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as theirs

from ..errors import QuantizedStateError
from ..nn_modules.surgery import dequantize
from ..quantization.config import BaseQuantizeConfig
from . import hf_load


class GPTQConfig(theirs.GPTQConfig):
    """The settings of a GPTQ checkpoint, those included that transformers would drop.

    transformers compares classes by this name with what a user passes.
    """

    def __init__(self, bits: int = 4, **given: Any) -> None:
        self.given = {"bits": bits} | given
        settings = as_settings(self.given)
        super().__init__(
            bits=settings.bits,
            group_size=settings.group_size,
            damp_percent=settings.damp_percent,
            desc_act=settings.desc_act,
            sym=settings.sym,
            true_sequential=settings.true_sequential,
            checkpoint_format=settings.checkpoint_format,
            **{key: given[key] for key in _WANTED_ON_LOAD if key in given},
        )

    def post_init(self) -> None:
        """Check nothing: transformers' check asks for optimum's version."""

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as they were read."""
        return self.given | {"quant_method": self.quant_method.value}


# Settings that say how to quantize, as transformers names them.
_WANTED_ON_LOAD = (
    "act_group_aware",
    "batch_size",
    "block_name_to_quantize",
    "dataset",
    "model_seqlen",
    "modules_in_block_to_quantize",
    "tokenizer",
)


def as_settings(given: dict[str, Any]) -> BaseQuantizeConfig:
    """Give our settings for a ``quantization_config``, whichever tool wrote it.

    :raises ConfigError: (a ValueError) if one cannot work
    """
    return BaseQuantizeConfig.from_quant_config(given | {"quant_method": "gptq"})


class AutoGPTQHfQuantizer(HfQuantizer):
    """Puts QuantLinears into a model that transformers loads, or quantizes it once loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._skeleton: hf_load.Skeleton | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **_kwargs: Any
    ) -> Any:
        if self.pre_quantized:
            settings = as_settings(dict(vars(self.quantization_config).get("given", {})))
            self._skeleton = hf_load.insert(model, settings, checkpoint_files)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Keep packed experts apart; transformers before 5.20 does not pass the model."""
        if self._skeleton is None:
            return weight_conversions
        return hf_load.without_parted(weight_conversions, self._skeleton.parted)

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        if self._skeleton is not None:
            hf_load.finish(model, self._skeleton)
            self._skeleton = None
        elif not self.pre_quantized:
            from .hf_quantize import quantize_loaded

            saved = quantize_loaded(model, self.quantization_config)
            self.quantization_config = model.config.quantization_config = GPTQConfig(**saved)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise QuantizedStateError(
                "Parts of the model are offloaded; load it without offloading to dequantize it."
            )
        dequantize(model, dtype or model.dtype)
        return model

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Tell that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that adapters can be trained on the model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell that ``generate`` may compile the model."""
        return True
