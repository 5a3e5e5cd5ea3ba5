import pytest
import torch

from auto_gptq.errors import ModuleShapeError
from auto_gptq.formats.gptq import pack_layer, trivial_g_idx, unpack_codes, unpack_zeros
from auto_gptq.formats.packing import pack, unpack
from tests.reference import plain_pack

ALL_BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


@ALL_BITS
def test_words_are_a_little_endian_stream_of_codes(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (96, 5))
    assert torch.equal(pack(codes, bits), plain_pack(codes, bits))


@ALL_BITS
def test_unpacking_gives_back_every_code(bits: int, device: torch.device) -> None:
    codes = torch.randint(0, 1 << bits, (64, 7), dtype=torch.uint8, device=device)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@ALL_BITS
def test_all_ones_do_not_spill_into_neighbours(bits: int) -> None:
    codes = torch.zeros(32, 1, dtype=torch.int32)
    codes[10:22] = (1 << bits) - 1  # with 3 bits these cross both word borders
    assert torch.equal(unpack(pack(codes, bits), bits).int(), codes)


def test_packing_refuses_a_length_that_fills_no_whole_words() -> None:
    with pytest.raises(ModuleShapeError, match=r"33 codes of 4 bits.*multiple of 32"):
        pack(torch.zeros(33, 2, dtype=torch.int32), 4)
    with pytest.raises(ModuleShapeError, match=r"4 words.*multiple of 3"):
        unpack(torch.zeros(4, 2, dtype=torch.int32), 3)


@ALL_BITS
@pytest.mark.parametrize(("checkpoint_format", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_zero_points_survive_both_formats(bits: int, checkpoint_format: str, offset: int) -> None:
    zeros = torch.randint(0, 1 << bits, (64, 3))  # [N, G], 0 among them
    codes = torch.randint(0, 1 << bits, (64, 96))
    packed = pack_layer(
        codes,
        torch.ones(64, 3),
        zeros,
        trivial_g_idx(96, 32),
        bits=bits,
        checkpoint_format=checkpoint_format,
    )
    assert torch.equal(unpack_zeros(packed.qzeros, bits, offset), zeros.t().int())
    assert torch.equal(unpack_codes(packed.qweight, bits), codes.t().to(torch.uint8))


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0x55555555]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, [0x77777777]),
        (8, [0x7F7F7F7F]),
    ],
)
def test_symmetric_zeros_of_v1_are_the_known_constants(bits: int, words: list[int]) -> None:
    zeros = torch.full((32, 1), 1 << (bits - 1))
    packed = pack_layer(
        torch.zeros(32, 32), torch.ones(32, 1), zeros, trivial_g_idx(32, -1), bits=bits
    )
    found = [int(word) & 0xFFFFFFFF for word in packed.qzeros[0]]
    assert found == words * (len(found) // len(words))


def test_a_zero_point_of_0_leaves_its_neighbours_alone_in_v1() -> None:
    """AutoGPTQ stored -1 as 0xFFFFFFFF there, over every later zero point of the word."""
    zeros = torch.full((8, 1), 8).repeat(4, 1)
    zeros[2] = 0
    packed = pack_layer(
        torch.zeros(32, 32), torch.ones(32, 1), zeros, trivial_g_idx(32, -1), bits=4
    )
    assert int(packed.qzeros[0, 0]) & 0xFFFFFFFF == 0x77777F77
    assert int(packed.qzeros[0, 1]) & 0xFFFFFFFF == 0x77777777
