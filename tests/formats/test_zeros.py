"""Zero points between gptq (v1), which stores zero - 1, and gptq_v2, which stores zero."""

from __future__ import annotations

import pytest
import torch

from auto_gptq.errors import CheckpointError
from auto_gptq.formats.gptq import ZERO_OFFSET, convert_zeros, has_zero_zeros, unpack_zeros
from auto_gptq.formats.packing import pack

ALL_BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def _stored(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return pack(zeros.t(), bits).t().contiguous()


@ALL_BITS
def test_zeros_go_to_v2_and_back(bits: int, device: torch.device) -> None:
    v1 = _stored(torch.randint(0, (1 << bits) - 1, (5, 96)), bits).to(device)
    v2 = convert_zeros(v1, bits, source="gptq", target="gptq_v2")
    assert torch.equal(unpack_zeros(v2, bits, 0), unpack_zeros(v1, bits, 1))
    back = convert_zeros(v2, bits, source="gptq_v2", target="gptq")
    assert torch.equal(back, v1)
    assert back.is_contiguous()


@pytest.mark.parametrize(
    ("bits", "difference"),
    [
        (2, [0x55555555]),
        (3, [0x49249249, 0x92492492, 0x24924924]),
        (4, [0x11111111]),
        (8, [0x01010101]),
    ],
)
def test_the_difference_is_the_known_constant(bits: int, difference: list[int]) -> None:
    v1 = _stored(torch.randint(0, (1 << bits) - 1, (2, 96)), bits)
    v2 = convert_zeros(v1, bits, source="gptq", target="gptq_v2")
    added = [int(x) & 0xFFFFFFFF for x in (v2 - v1)[0]]
    if bits == 3:  # the words are one stream: carries go from one into the next
        streams = zip(_streams(v1), _streams(v2), strict=True)
        constant = sum(word << 32 * i for i, word in enumerate(difference))
        assert all(after - before == constant for before, after in streams)
    else:
        assert added == difference * (len(added) // len(difference))


def _streams(words: torch.Tensor) -> list[int]:
    triples = words.reshape(-1, 3).tolist()
    return [sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(t)) for t in triples]


@ALL_BITS
def test_a_zero_of_0_goes_to_v2_but_not_to_v1(bits: int) -> None:
    zeros = torch.full((2, 32), 1)
    zeros[1, 7] = zeros[0, 3] = 0
    v2 = _stored(zeros, bits)
    assert has_zero_zeros(v2, bits, "gptq_v2")
    with pytest.raises(CheckpointError, match=r"a\.b has 2 zero points of 0.*'gptq_v2'"):
        convert_zeros(v2, bits, source="gptq_v2", target="gptq", name="a.b")
    v1 = _stored((zeros - 1) & ((1 << bits) - 1), bits)  # -1 as the largest code
    assert torch.equal(convert_zeros(v1, bits, source="gptq", target="gptq_v2"), v2)


def test_formats_that_store_zeros_alike_need_no_conversion() -> None:
    words = torch.zeros(1, 4, dtype=torch.int32)
    for source, target in (("gptq", "gptq"), ("gptq", "marlin"), ("gptq_v2", "gemm")):
        assert ZERO_OFFSET[source] == ZERO_OFFSET[target]
        assert convert_zeros(words, 4, source=source, target=target) is words
