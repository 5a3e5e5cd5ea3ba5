"""From AutoGPTQ's flags to one of its kernel classes: the old flag names end here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ConfigError
from .variants import CLASSES, OldQuantLinear

if TYPE_CHECKING:
    from ...quantization.config import BaseQuantizeConfig


def dynamically_import_QuantLinear(
    use_triton: bool,
    desc_act: bool,
    group_size: int,
    bits: int,
    disable_exllama: bool | None = None,
    disable_exllamav2: bool = False,
    use_qigen: bool = False,
    use_marlin: bool = False,
    use_tritonv2: bool = False,
    *,
    disable_marlin: bool = True,  # 0.7.1's opposite of use_marlin
) -> type[OldQuantLinear]:
    """Give the class that AutoGPTQ took for these flags, had all its kernels been compiled.

    Any QuantLinear is an instance of it.

    :raises ConfigError: (a ValueError) for QIGen
    """
    if use_qigen:
        raise ConfigError(
            "QIGen is not available: use_qigen must be False. The CPU kernels need no flag."
        )
    if use_triton or use_tritonv2:
        return CLASSES["tritonv2" if use_tritonv2 else "triton"]
    if disable_exllama is None:
        disable_exllama = not disable_exllamav2
    wanted = (
        ("marlin", use_marlin or not disable_marlin),
        ("exllamav2", not disable_exllamav2),
        ("exllama", not disable_exllama),
    )
    if bits == 4:
        for quant_type, is_wanted in wanted:
            if is_wanted:
                return CLASSES[quant_type]
    return CLASSES["cuda" if desc_act and group_size != -1 else "cuda-old"]


def marlin_refusal(cfg: BaseQuantizeConfig) -> str | None:
    """Say why a checkpoint cannot be brought into the Marlin format, or None if it can."""
    refusals = (
        (cfg.bits != 4, f"bits is {cfg.bits}, not 4"),
        (cfg.group_size not in (-1, 128), f"group_size is {cfg.group_size}, not -1 or 128"),
        (not cfg.sym, "sym is False"),
        (cfg.desc_act, "desc_act is True"),
        (cfg.quant_method == "awq", "quant_method is 'awq'"),
    )
    return next((reason for refused, reason in refusals if refused), None)
