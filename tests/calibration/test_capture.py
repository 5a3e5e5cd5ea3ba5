"""What each block is called with is noted, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from auto_gptq.calibration.capture import capture
from auto_gptq.calibration.examples import make_batches
from auto_gptq.pipeline.block import run_block
from tests.tiny import tiny_examples, tiny_model


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2", "gpt2", "bloom", "gptj"])
def test_running_the_blocks_one_by_one_gives_what_the_model_gives(model_type: str) -> None:
    """gemma2 and qwen2 give their blocks different masks; gptj's and bloom's return tuples."""
    model = tiny_model(model_type, torch.float32)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    batches = make_batches(tiny_examples(3, 24), batch_size=2)
    wanted: list[torch.Tensor] = []
    hook = blocks[-1].register_forward_hook(
        lambda _module, _args, output: wanted.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hook.remove()
        captured = capture(model, list(blocks), batches)
        for b, expected in enumerate(wanted):
            hidden = captured.hidden[b]
            for i, block in enumerate(blocks):
                hidden = run_block(block, hidden, captured.calls[i][b])
            assert torch.allclose(hidden, expected, atol=1e-5)
    assert not any("forward" in block.__dict__ for block in blocks)


def test_a_mask_is_kept_only_where_something_is_padded() -> None:
    model = tiny_model()
    examples = [
        {key: row[:length] for key, row in example.items()}
        for example, length in zip(tiny_examples(4), (8, 8, 8, 5), strict=True)
    ]
    captured = capture(model.float(), list(model.model.layers), make_batches(examples, 2))
    assert captured.keep[0] is None
    assert captured.keep[1] is not None
    assert captured.keep[1].sum(1).tolist() == [8, 5]
