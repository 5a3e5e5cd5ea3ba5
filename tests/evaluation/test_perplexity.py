import math

import pytest
import torch

from auto_gptq.evaluation.perplexity import perplexity
from tests.tiny import tiny_model


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_the_exponent_of_the_mean_surprise(batch_size: int) -> None:
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 256, (5, 12))
    surprise = []
    for row in rows:
        logits = model(input_ids=row[None]).logits[0].double()
        for position in range(11):
            surprise.append(-torch.log_softmax(logits[position], 0)[row[position + 1]].item())
    expected = math.exp(sum(surprise) / len(surprise))
    assert perplexity(model, rows, batch_size) == pytest.approx(expected, rel=1e-5)
