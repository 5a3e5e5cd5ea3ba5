"""A mixture of experts trained on real text, so that its loss after quantizing means something."""

from __future__ import annotations

import argparse
import inspect
import tarfile
import typing
import zipfile
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear

LENGTH, BATCH, STEPS = 128, 16, 160


def _bytes(*modules: Any) -> Tensor:
    text = "".join(inspect.getsource(module) for module in modules)
    return torch.tensor(list(text.encode()), dtype=torch.long)


def _rows(data: Tensor, count: int) -> Tensor:
    starts = torch.randint(len(data) - LENGTH, (count,))
    return torch.stack([data[start : start + LENGTH] for start in starts])


@torch.no_grad()
def _loss(model: Any, rows: Tensor) -> float:
    losses = [model(input_ids=part, labels=part, use_cache=False).loss for part in rows.split(16)]
    return float(torch.stack(losses).mean())


@pytest.mark.slow
def test_a_trained_mixtral_keeps_its_loss_within_two_percent() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        router_aux_loss_coef=0.02,
        output_router_logits=True,
    )
    model: Any = MixtralForCausalLM(config)
    data, unseen = _bytes(argparse, tarfile, typing), _rows(_bytes(zipfile), 64)
    untrained = _loss(model, unseen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = _rows(data, BATCH)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    model.config.output_router_logits = False
    before = _loss(model, unseen)
    assert before < 0.5 * untrained  # it has learned something
    wrapper = BaseGPTQForCausalLM(model, False, BaseQuantizeConfig(bits=4, group_size=32))
    examples = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in _rows(data, 128)]
    wrapper.quantize(examples, batch_size=16)
    after = _loss(model, unseen)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 3 * (4 + 8 * 3)
    print(f"loss {untrained:.3f} untrained, {before:.4f} trained, {after:.4f} in 4 bits")
    assert after < 1.02 * before
    assert len({entry.routed for entry in wrapper.report}) > 8  # the router does choose
