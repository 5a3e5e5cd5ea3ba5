"""Several processes, one GPU each, that quantize one model together: torch.distributed, no more.

Each rank runs its share of the calibration rows through the blocks.  Hessians are summed over the
ranks, so all hold the same; each solves its share of a matrix's rows, and all gather the integers.
After that every rank has the same quantized block.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..calibration.examples import Batch
from ..errors import ConfigError
from ..quantization.hessian import Hessian
from ..quantization.solver import Solution, part_rows

T = TypeVar("T")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Join the other processes, where ``torchrun`` started this one or a group exists."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                return cls()
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_leave)  # else NCCL complains at the end of the script
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def row_parts(self) -> int:
        """Parts of a matrix's rows that this process solves apart: see :meth:`parts`."""
        return 2 if self.count == 1 else 1

    @property
    def is_first(self) -> bool:
        """Tell whether this process writes and speaks."""
        return self.rank == 0

    @contextmanager
    def device(self, device: torch.device) -> Iterator[torch.device]:
        """Give this rank's own device, and make it the current one, as NCCL wants it.

        Of several GPUs on one host each rank takes another.
        """
        if self.count == 1 or device.type != "cuda":
            yield device
            return
        own = torch.device("cuda", dist.get_node_local_rank(self.rank))
        with torch.cuda.device(own):
            yield own

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """Give this rank's batches: neighbours, so that sums over ranks part where halves do.

        :raises ConfigError: if there are fewer rows than ranks
        """
        if self.count == 1:
            return list(batches)
        parted = list(batches)
        while len(parted) < self.count:  # cut the largest in two
            i = max(range(len(parted)), key=lambda i: len(parted[i].input_ids))
            rows = len(parted[i].input_ids)
            if rows < 2:
                raise ConfigError(
                    f"{len(parted)} calibration rows cannot be shared by {self.count} ranks; give "
                    "more, or start fewer."
                )
            parted[i : i + 1] = [
                Batch(parted[i].input_ids[part], parted[i].attention_mask[part])
                for part in (slice(rows // 2), slice(rows // 2, None))
            ]
        return parted[self._part(len(parted))]

    def parts(self, batches: int) -> list[range]:
        """Part this rank's batches into those whose sums are taken apart and then added.

        One process adds the sums of two halves, and two processes add theirs: fp32 sums depend on
        their order in the last bits, and from there more and more codes would differ.
        """
        cuts = [0, batches // 2, batches] if self.count == 1 and batches > 1 else [0, batches]
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def sum_hessian(self, hessian: Hessian, with_pull: bool) -> None:
        """Add the other ranks' sums and numbers of tokens, in place."""
        if self.count > 1:
            hessian.sum_over(dist.all_reduce, with_pull)

    def solve(
        self,
        solver: Callable[[slice], Solution],
        rows: int,  # of the matrix, which is the same on every rank
    ) -> Solution:
        """Solve this rank's rows and gather the others': rows do not depend on each other."""
        parts = part_rows(rows, self.count)
        if self.count == 1 or len(parts) < self.count:
            return solver(slice(0, rows))
        own = solver(parts[self.rank])
        share = parts[0].stop

        def gathered(part: Tensor) -> Tensor:
            padded = part.contiguous()
            if len(part) < share:
                padded = torch.cat([part, part.new_zeros(share - len(part), *part.shape[1:])])
            everyone = part.new_empty(self.count * share, *part.shape[1:])
            dist.all_gather_into_tensor(everyone, padded)
            return everyone[:rows]

        # What is small goes together.
        columns = [own.scales, own.zeros.to(torch.float32), own.loss[:, None], own.energy[:, None]]
        small = gathered(torch.cat(columns, 1))
        scales, zeros, sums = small.split([own.scales.shape[1], own.zeros.shape[1], 2], 1)
        return replace(
            own,
            codes=gathered(own.codes),
            scales=scales.contiguous(),
            zeros=zeros.to(torch.int32),
            loss=sums[:, 0],
            energy=sums[:, 1],
            unrounded=None if own.unrounded is None else gathered(own.unrounded),
        )

    def tell(self, solution: Solution) -> Solution:
        """Give every rank what the first has found."""
        if self.count == 1:
            return solution
        told = {name: getattr(solution, name).contiguous() for name in ("codes", "scales", "zeros")}
        for tensor in told.values():
            dist.broadcast(tensor, 0)
        return replace(solution, **told, unrounded=None)

    def tell_tensor(self, tensor: Tensor, device: torch.device) -> None:
        """Have on every rank what the first has in a tensor, in place, through its own device."""
        if self.count > 1:
            on_device = tensor.to(device).contiguous()
            dist.broadcast(on_device, 0)
            tensor.copy_(on_device)

    def all(self, here: bool) -> bool:
        """Tell whether something holds on every rank."""
        if self.count == 1:
            return here
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        answer = torch.tensor(int(here), device=device)
        dist.all_reduce(answer, dist.ReduceOp.MIN)
        return bool(answer)

    def agree(self, decide: Callable[[], T]) -> T:
        """Let the first rank decide for all; its errors are raised on every rank."""
        if self.count == 1:
            return decide()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = decide()
            except Exception as error:  # every rank must hear of it, or wait forever
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def _part(self, count: int) -> slice:
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)
