"""Perplexity over rows of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def perplexity(
    model: Any,
    rows: Tensor,  # [R, T] int64
    batch_size: int = 4,
) -> float:
    """Give exp of the mean negative log-likelihood of every token but the first of each row.

    The logits of a row are turned into probabilities in fp32, whatever dtype the model runs in.
    """
    total = 0.0
    for batch in rows.split(batch_size):
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))
