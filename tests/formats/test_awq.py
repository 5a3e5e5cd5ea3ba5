"""AWQ's layout, against a packer that puts one code after another in its place."""

from __future__ import annotations

import torch

from auto_gptq.formats import awq
from auto_gptq.formats.gptq import unpack_codes, unpack_zeros
from tests.reference import plain_awq_pack


def test_columns_come_back_in_order(device: torch.device) -> None:
    codes = torch.randint(0, 16, (5, 64))
    words = plain_awq_pack(codes).to(device)
    assert torch.equal(awq.unpack_columns(words).cpu().long(), codes)


def test_a_known_word() -> None:
    word = torch.tensor([[0x75316420]], dtype=torch.int32)  # 0 2 4 6 1 3 5 7 from the low end
    assert awq.unpack_columns(word).tolist() == [list(range(8))]


def test_codes_and_zeros_are_moved_without_a_change(device: torch.device) -> None:
    codes, zeros = torch.randint(0, 16, (96, 64)), torch.randint(0, 16, (3, 64))
    zeros[0, :3] = torch.tensor([0, 15, 0])
    qweight = awq.from_awq_weight(plain_awq_pack(codes).to(device))
    qzeros = awq.from_awq_zeros(plain_awq_pack(zeros).to(device))
    assert (qweight.shape, qzeros.shape) == ((12, 64), (3, 8))
    assert (qweight.dtype, qzeros.dtype) == (torch.int32, torch.int32)
    assert torch.equal(unpack_codes(qweight, 4).cpu().long(), codes)
    assert torch.equal(unpack_zeros(qzeros, 4, 0).cpu().long(), zeros)
