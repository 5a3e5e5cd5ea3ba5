"""Hidden states between blocks."""

from __future__ import annotations

import pytest
import torch

from auto_gptq.calibration.activations import Activations
from auto_gptq.errors import NumericsError


def test_large_numbers_pass_though_their_sum_overflows_and_infinity_is_named() -> None:
    hidden = Activations(torch.device("cpu"), torch.bfloat16, 16, home="device")
    hidden.append(torch.zeros(1, 8, 4))
    hidden.append(torch.full((1, 8, 4), 3e38))
    hidden.check_finite("the outputs")
    for wrong, kind in ((torch.inf, "infinity"), (torch.nan, "NaN")):
        tensor = torch.full((1, 8, 4), -3e38)
        tensor[0, 3, 1] = wrong
        hidden[1] = tensor
        with pytest.raises(NumericsError, match=f"the outputs hold {kind} in calibration batch 1"):
            hidden.check_finite("the outputs")
