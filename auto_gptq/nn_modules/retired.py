"""Classes of AutoGPTQ that cannot be built any more; their names stay, to be imported."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RetiredError

# Name → what to use instead.
_RETIRED = {
    "QuantLinearHpu": "Gaudi kernels are gone; use auto_gptq.nn_modules.qlinear.QuantLinear, which "
    "runs on any device that torch knows.",
    "QuantLinearQigen": "QIGen is gone; use auto_gptq.nn_modules.qlinear.QuantLinear, which has "
    "its own CPU kernels.",
    "FusedBaseModule": "Models run unfused; leave it out.",
    "FusedBaseAttentionModule": "Models run with their own attention; leave it out.",
    "FusedBaseMLPModule": "Models run with their own MLP; leave it out.",
    "FusedLlamaAttentionForQuantizedModel": "Models run with their own attention; leave it out.",
    "FusedLlamaMLPForQuantizedModel": "Models run with their own MLP; leave it out.",
    "FusedGPTJAttentionForQuantizedModel": "Models run with their own attention; leave it out.",
}


class Retired(nn.Module):
    """A name without a body.

    :raises RetiredError: (a NotImplementedError) whenever one is built
    """

    instead = "It has no replacement."

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise RetiredError(f"{type(self).__name__} cannot be built any more. {self.instead}")


CLASSES = {
    name: type(name, (Retired,), {"instead": instead, "__module__": __name__})
    for name, instead in _RETIRED.items()
}
globals().update(CLASSES)
