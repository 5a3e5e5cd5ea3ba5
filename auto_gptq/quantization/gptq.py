"""``GPTQ``: one layer's Hessian and solution, with the interface that AutoGPTQ and optimum use."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, QuantizedStateError
from ..formats.grid import GridRule
from .quantizer import Quantizer
from .solver import SolverOptions, solve

logger = logging.getLogger(__name__)


class GPTQ:
    """Collect the inputs of a layer, then replace its weight by a quantized one.

    ``H`` is 2/n times the sum of ``x xᵀ``, n the number of sequences.

    :param layer: a Linear, Conv1D or Conv2d
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        weight = self._weight()
        self.dev = weight.device
        self.rows, self.columns = weight.shape
        self.H: Tensor | None = torch.zeros(self.columns, self.columns, device=self.dev)
        self.nsamples = 0
        self.quantizer = Quantizer()

    def add_batch(
        self,
        inp: Tensor,  # [T, K], [B, T, K], or images for a Conv2d
        out: Tensor | None = None,
    ) -> None:
        """Add the inputs of one forward pass.

        :raises QuantizedStateError: (an OSError) after ``fasterquant`` or ``free``
        """
        hessian = self._hessian()
        if isinstance(self.layer, nn.Conv2d):
            conv: Any = self.layer
            unfold = nn.Unfold(conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            inp = unfold(inp).transpose(-2, -1)
        sequences = inp.shape[0] if inp.dim() > 2 else 1
        x = inp.detach().reshape(-1, self.columns).to(self.dev, torch.float32)
        self.nsamples += sequences
        hessian.mul_((self.nsamples - sequences) / self.nsamples)
        hessian.addmm_(x.t(), x, alpha=2 / self.nsamples)

    def fasterquant(
        self,
        blocksize: int = 128,
        percdamp: float = 0.01,
        group_size: int = -1,
        actorder: bool = False,
        static_groups: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize the layer's weight, which gets the dequantized values.

        Zero points start at 1, so that the v1 format can hold them.

        :param blocksize: AutoGPTQ's; the solver chooses its own
        :return: scales ``[N, G]`` fp32, zeros ``[N, G]`` fp32, g_idx ``[K]`` int32
        :raises ConfigError: (a ValueError) before ``quantizer.configure``
        :raises QuantizedStateError: (an OSError) when called again
        """
        grid = self.quantizer
        if not grid.enabled():
            raise ConfigError("Choose a width first: gptq.quantizer.configure(bits=4, sym=True).")
        options = SolverOptions(
            GridRule(grid.bits, grid.sym, scale_dtype=torch.float32),
            group_size=group_size,
            damp_percent=percdamp,
            act_order=actorder,
            static_groups=static_groups,
        )
        weight = self._weight()
        solution = solve(weight, self._hessian(), options)
        with torch.no_grad():
            weight.copy_(solution.dequantize())
        logger.debug("Solved %d x %d with loss %g.", *weight.shape, float(solution.loss.sum()))
        self.free()
        return solution.scales, solution.zeros.to(torch.float32), solution.g_idx

    def free(self) -> None:
        """Give the memory of the Hessian back."""
        self.H = None

    def _hessian(self) -> Tensor:
        if self.H is None:
            raise QuantizedStateError(
                "The Hessian of this layer was freed; make a new GPTQ(layer) to solve it again."
            )
        return self.H

    def _weight(self) -> Tensor:
        """Give a view ``[N, K]`` of the layer's weight."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[operator]
        # Conv1D keeps [in, out]; it has `nf` where a Linear has `out_features`.
        return weight.t() if hasattr(self.layer, "nf") else weight.flatten(1)
