"""torch.compile takes a quantized model whole, with the cache of fixed size of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from auto_gptq import BaseQuantizeConfig
from auto_gptq.kernels import choose
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.surgery import prepare
from tests.tiny import VOCABULARY, tiny_examples, tiny_model


@pytest.fixture(params=["gptq", "tiles"])
def model(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> Any:
    """A tiny quantized model with its weights in one layout and the other."""
    wrapper = BaseGPTQForCausalLM(
        tiny_model("llama", torch.float32), False, BaseQuantizeConfig(bits=4, group_size=32)
    )
    wrapper.quantize(tiny_examples(), batch_size=2)
    wrapper.to(device)
    layout = choose.Kernel(request.param, request.param, None)
    monkeypatch.setattr(choose, "KERNELS", (layout, *choose.KERNELS))
    prepare(wrapper.model)
    return wrapper.model


def test_a_model_compiles_without_a_break(model: Any) -> None:
    ids = torch.randint(3, VOCABULARY, (1, 7), device=model.device)

    def logits(forward: Any) -> torch.Tensor:
        cache = StaticCache(model.config, max_cache_len=12)
        found = [forward(input_ids=ids, past_key_values=cache).logits]
        for token in range(3, 6):
            step = torch.tensor([[token]], device=model.device)
            position = torch.tensor([[ids.shape[1] + token - 3]], device=model.device)
            found.append(
                forward(input_ids=step, position_ids=position, past_key_values=cache).logits
            )
        return torch.cat(found, 1)

    with torch.inference_mode():
        wanted = logits(model)
        torch.compiler.reset()
        found = logits(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
