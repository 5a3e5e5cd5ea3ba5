"""The operations between the products of a decoding step, held to fp64 and to transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from auto_gptq.kernels import decode_ops, native

native.load()
ops = torch.ops.auto_gptq
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tolerance(dtype: torch.dtype) -> float:
    """Allow a few roundings of the dtype, of values around 1."""
    return 8 * max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 4096), (2, 576), (2, 11008), (1, 16384)], ids=str)
@pytest.mark.parametrize("update", [False, True], ids=["read", "updated"])
def test_add_norm_adds_in_place_and_norms(device, dtype, shape, update) -> None:
    hidden, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    change = torch.randn(shape, dtype=dtype) if update else None
    total = hidden if change is None else hidden + change
    wide = total.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    held = hidden.to(device).clone()
    normed = ops.add_norm(
        held, None if change is None else change.to(device), weight.to(device), 1e-5
    )
    assert torch.equal(held.cpu(), total)
    error = (normed.cpu().double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max() < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_gate_multiplies_the_opened_half_with_the_other(device, dtype, gelu) -> None:
    halves = torch.randn(3, 2 * 1000, dtype=dtype, device=device)
    first, second = halves.double().chunk(2, -1)
    opened = (
        torch.nn.functional.gelu(first, approximate="tanh") if gelu else first * first.sigmoid()
    )
    wanted = opened * second
    error = (ops.gate(halves, gelu).double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max() < tolerance(dtype)


def attention_case(
    heads: int, kv_heads: int, channels: int, rotated: int, dtype: torch.dtype, norms: bool
) -> dict[str, Any]:
    batch, capacity, length = 3, 300, 261
    angle = torch.arange(capacity)[:, None] / 10 ** torch.linspace(0, 3, rotated // 2)
    angle = torch.cat((angle, angle), -1)
    return {
        "qkv": torch.randn(batch, (heads + 2 * kv_heads) * channels).to(dtype),
        "cosine": angle.cos().to(dtype),
        "sine": angle.sin().to(dtype),
        "q_norm": torch.randn(channels).to(dtype) if norms else None,
        "k_norm": torch.randn(channels).to(dtype) if norms else None,
        "keys": torch.randn(batch, kv_heads, capacity, channels).to(dtype),
        "values": torch.randn(batch, kv_heads, capacity, channels).to(dtype),
        "length": torch.tensor([length]),
        "first": torch.tensor([0, 17, length]),  # no padding, some, and a row's first token
        "scale": channels**-0.5,
        "epsilon": 1e-6,
    }


def plain_attention(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Do in fp64, head by head, what the operator does."""
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in case.items()}  # fmt: skip
    keys, values, length = wide["keys"].clone(), wide["values"].clone(), int(case["length"])
    batch, kv_heads, _, channels = keys.shape
    heads = wide["qkv"].view(batch, -1, channels)
    queries = heads.shape[1] - 2 * kv_heads
    half = wide["cosine"].shape[1] // 2

    def turned(x: Tensor, position: int, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x / (x.pow(2).mean() + wide["epsilon"]).sqrt() * norm
        low, high = x[:half].clone(), x[half : 2 * half].clone()
        cosine, sine = wide["cosine"][position, :half], wide["sine"][position, :half]
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine, x[2 * half :]))

    out = torch.empty(batch, queries, channels, dtype=torch.float64)
    for b in range(batch):
        begin = int(case["first"][b])
        for p in range(kv_heads):
            keys[b, p, length] = turned(heads[b, queries + p], length - begin, wide["k_norm"])
            values[b, p, length] = heads[b, queries + kv_heads + p]
        for q in range(queries):
            p = q // (queries // kv_heads)
            seen = slice(begin, length + 1)
            query = turned(heads[b, q], length - begin, wide["q_norm"])
            weights = (keys[b, p, seen] @ query * wide["scale"]).softmax(0)
            out[b, q] = weights @ values[b, p, seen]
    return out.flatten(1), keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "rotated"),
    [(4, 4, 128, 128), (9, 3, 64, 64), (8, 2, 32, 32), (2, 1, 16, 16), (6, 3, 80, 32),
     (4, 1, 256, 256)],
    ids=str,
)  # fmt: skip
def test_decode_attention_agrees_with_fp64(
    device, heads, kv_heads, channels, rotated, dtype, norms
) -> None:
    case = attention_case(heads, kv_heads, channels, rotated, dtype, norms)
    wanted, keys, values = plain_attention(case)
    for cache in (case["keys"], case["values"]):
        cache[:, :, int(case["length"]) + 1 :] = float("nan")  # places not reached hold anything
    case = {k: v.to(device) if torch.is_tensor(v) else v for k, v in case.items()}
    _, arrived = decode_ops.decode_scratch(3, heads, kv_heads, channels, device)
    for parts in (1, 5, 32):  # of the cache, side by side
        partial = torch.full((3, heads, parts, channels + 2), float("nan"), device=device)
        for _ in range(2):  # the second call finds the counters as the first one left them
            out = ops.decode_attention(**case, partial=partial, arrived=arrived)
            assert (out.cpu().double() - wanted).abs().max() < 2 * tolerance(dtype)
    assert (arrived == 0).all()
    plain = decode_ops.decode_attention(**case, partial=partial, arrived=arrived)
    assert (plain.cpu().double() - wanted).abs().max() < 2 * tolerance(dtype)
    used = slice(0, int(case["length"]) + 1)
    for held, right in ((case["keys"], keys), (case["values"], values)):
        difference = (held.cpu().double() - right)[:, :, used].abs()
        assert difference.max() < 4 * tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 33, 32000, 50257])
def test_append_best_takes_the_first_of_the_highest(device, dtype, vocabulary) -> None:
    logits = torch.randn(4, vocabulary, device=device).to(dtype)
    logits[1, vocabulary // 2 :] = logits[1].max()  # many are equal
    logits[2, -1] = 100
    best = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    tokens = torch.full((4, 9), -1, device=device)
    length = torch.tensor([5], device=device)
    ended = torch.tensor([False, False, False, True], device=device)
    stops = torch.tensor([vocabulary + 1, vocabulary - 1], device=device)
    ops.append_best(logits, tokens, length, ended, stops, 7)
    assert tokens[:, 5].tolist() == [*best[:3].tolist(), 7]
    assert (tokens[:, [0, 4, 6]] == -1).all()
    assert ended.tolist() == [*(best[:3] == vocabulary - 1).tolist(), True]
    before = ended.clone()
    ops.append_best(logits, tokens, length + 1, ended, None, 7)
    assert torch.equal(ended, before)


def test_operators_pass_opcheck(device) -> None:
    case = attention_case(4, 2, 16, 16, torch.float32, norms=True)
    case = {k: v.to(device) if torch.is_tensor(v) else v for k, v in case.items()}
    scratch = decode_ops.decode_scratch(3, 4, 2, 16, device)
    hidden, ones = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    tokens = torch.zeros(2, 9, dtype=torch.int64, device=device)
    place, ended = torch.tensor([5], device=device), torch.zeros(2, device=device).bool()
    checks = ("test_schema", "test_faketensor")

    def check(operator, *arguments: Any) -> None:
        torch.library.opcheck(operator, arguments, test_utils=checks)

    check(ops.decode_attention, *list(case.values())[:9], *scratch, case["scale"], case["epsilon"])
    check(ops.add_norm, hidden, hidden.clone(), ones, 1e-5)
    check(ops.gate, hidden, False)
    check(ops.append_best, hidden, tokens, place, ended, place, 7)


@pytest.mark.gpu
def test_kernels_refuse_what_they_cannot_hold() -> None:
    case = attention_case(4, 2, 12, 12, torch.float16, norms=False)
    case = {k: v.cuda() if torch.is_tensor(v) else v for k, v in case.items()}
    scratch = decode_ops.decode_scratch(3, 4, 2, 12, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="heads have 12 channels"):
        ops.decode_attention(**case, partial=scratch[0], arrived=scratch[1])
    with pytest.raises(RuntimeError, match="multiple of 8"):
        ops.add_norm(torch.ones(1, 36).cuda(), None, torch.ones(36).cuda(), 1e-5)
