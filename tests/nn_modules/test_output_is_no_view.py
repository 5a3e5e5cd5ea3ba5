import pytest
import torch

from auto_gptq.nn_modules.qlinear import QuantLinear


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 30, 64)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_output_may_be_written_into_while_training(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """PEFT's AdaLoRA adds to it in place.

    The native kernel returned a view of its buffer, and autograd refuses writes into a view that
    an operator made.
    """
    layer = QuantLinear(4, 32, 64, 32, bias=False)
    y = layer(torch.ones(shape, dtype=dtype, requires_grad=True))
    y += 1
    y.sum().backward()
