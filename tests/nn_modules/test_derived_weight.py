"""Nothing may be written into ``QuantLinear.weight`` and vanish."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from auto_gptq.errors import DerivedWeightError
from auto_gptq.nn_modules.qlinear import QuantLinear


@pytest.fixture
def layer() -> QuantLinear:
    layer = QuantLinear(4, 32, 64, 32, bias=True)
    layer.pack_codes(
        torch.randint(0, 16, (32, 64)),
        torch.rand(32, 2) + 0.1,
        torch.full((32, 2), 8.0),
        torch.arange(64) // 32,
        torch.rand(32),
    )
    return layer


def _set_data(layer: QuantLinear) -> None:
    layer.weight.data = torch.zeros(32, 64)


def _add_to_data(layer: QuantLinear) -> None:
    layer.weight.data += 1


def _item(layer: QuantLinear) -> None:
    layer.weight[0] = 1


def _row(layer: QuantLinear) -> None:
    layer.weight[0].zero_()


def _require_grad(layer: QuantLinear) -> None:
    layer.weight.requires_grad = True


def _set_weight(layer: QuantLinear) -> None:
    layer.weight = nn.Parameter(torch.zeros(32, 64))


WRITES: dict[str, Callable[[QuantLinear], object]] = {
    "weight =": _set_weight,
    "weight.data =": _set_data,
    "weight.data +=": _add_to_data,
    "weight[0] =": _item,
    "weight[0].zero_()": _row,
    "weight.copy_": lambda layer: layer.weight.copy_(torch.zeros(32, 64)),
    "weight.mul_": lambda layer: layer.weight.mul_(2),
    "weight.data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(32, 64)),
    "weight.detach().t().fill_": lambda layer: layer.weight.detach().t().fill_(0),
    "weight.view(-1).add_": lambda layer: layer.weight.view(-1).add_(1),
    "weight.half().zero_": lambda layer: layer.weight.half().zero_(),
    "rows.zero_": lambda layer: [row.zero_() for row in layer.weight.unbind()],
    "torch.add out=": lambda layer: torch.add(torch.ones(32, 64), 1, out=layer.weight),
    "aten.add_": lambda layer: torch.ops.aten.add_(layer.weight, 1),
    "aten.add_.Tensor": lambda layer: torch.ops.aten.add_.Tensor(layer.weight, torch.ones(64)),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "relu inplace": lambda layer: nn.functional.relu(layer.weight, inplace=True),
    "init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "init.kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "requires_grad =": _require_grad,
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_into_the_weight_raises(layer: QuantLinear, write: Callable[..., object]) -> None:
    before = layer.dequantize(torch.float32)
    with pytest.raises(DerivedWeightError, match="derived from its packed integers"):
        write(layer)
    assert torch.equal(layer.dequantize(torch.float32), before)


def _plus_one_in_place(weight: Tensor) -> Tensor:
    return (weight * 2).add_(1)


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda weight: torch.ones(3, 64, dtype=weight.dtype) @ weight.t(),
    "sum": lambda weight: weight.float().sum(1),
    "norm": lambda weight: torch.linalg.norm(weight.float(), dim=1),
    "invert": lambda weight: ~(weight > 0),
    "result written": _plus_one_in_place,
    "clone written": lambda weight: weight.data.clone().zero_(),
    "other written": lambda weight: torch.zeros(32, 64).copy_(weight),
    "out of a read": lambda weight: torch.add(weight, 1, out=torch.empty_like(weight.clone())),
    "deepcopy": copy.deepcopy,
    "concatenated": lambda weight: torch.cat([weight, weight]),
    "svd": lambda weight: torch.linalg.svd(weight.float(), full_matrices=False)[1],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_weight_computes_like_a_plain_tensor(
    layer: QuantLinear, read: Callable[[Tensor], Tensor]
) -> None:
    found, wanted = read(layer.weight), read(layer.dequantize(layer.scales.dtype))
    assert type(found) is Tensor
    assert torch.equal(found, wanted)


def test_freezing_the_weight_is_allowed(layer: QuantLinear) -> None:
    layer.weight.requires_grad = False
    layer.weight.requires_grad_(False)
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad


def test_the_weight_is_saved_as_a_plain_tensor(layer: QuantLinear) -> None:
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert type(read) is Tensor
    assert torch.equal(read, layer.dequantize(read.dtype))


def test_a_copied_layer_computes_the_same_from_integers_of_its_own(layer: QuantLinear) -> None:
    x = torch.rand(3, 64)
    twin = copy.deepcopy(layer)
    wanted = layer(x)
    layer.qweight.zero_()
    assert torch.equal(twin(x), wanted)


class _ReadsWeight(nn.Module):
    """What GPT-J's attention does, and what an adapter like DoRA does."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.to(self.layer.weight.dtype)).float()
        return y / self.layer.weight.float().norm(dim=1)


def test_a_compiled_module_that_reads_the_weight_gives_the_same(layer: QuantLinear) -> None:
    module, x = _ReadsWeight(layer), torch.rand(3, 64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), module(x), rtol=1e-6)
