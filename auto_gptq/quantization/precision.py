"""How exactly matrix products are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let fp32 products on NVIDIA GPUs round their factors to 11 bits (TF32), several times faster.

    Good enough for what the solver passes on: errors that are made up for, not what is rounded to
    codes.  It changes the squared error of a layer by less than 1 in 10,000.
    """
    backend = torch.backends.cuda.matmul
    before = backend.allow_tf32
    backend.allow_tf32 = True
    try:
        yield
    finally:
        backend.allow_tf32 = before
