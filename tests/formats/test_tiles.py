"""Tiles and the checkpoint's tensors are two forms of the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_gptq.formats.gptq import GPTQTensors, group_count, trivial_g_idx, unpack_codes
from auto_gptq.formats.tiles import (
    find_obstacle,
    from_tiles,
    order_for_cpu,
    order_for_lanes,
    pad,
    run_length,
    sort_groups,
    tile_codes,
    to_tiles,
)

BITS = (2, 3, 4, 8)


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def random_packed(bits: int, group_size: int, k: int, n: int, act_order: bool) -> GPTQTensors:
    groups = group_count(k, group_size)
    g_idx = trivial_g_idx(k, group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    qzeros = random_words(groups, n // 32 * bits)
    return GPTQTensors(random_words(k // 32 * bits, n), qzeros, torch.rand(groups, n), g_idx)


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([16, 32, 48, 64, 128, -1]),
    k=st.integers(1, 9).map(lambda i: 32 * i),
    n=st.integers(1, 5).map(lambda i: 32 * i),
    act_order=st.booleans(),
    zero_offset=st.sampled_from([0, 1]),
)
def test_tiles_give_the_tensors_back_bit_for_bit(
    bits: int, group_size: int, k: int, n: int, act_order: bool, zero_offset: int
) -> None:
    packed = random_packed(bits, group_size, k, n, act_order)
    tiled = to_tiles(packed, bits, group_size, zero_offset)
    assert (tiled.perm is None) == torch.equal(packed.g_idx, trivial_g_idx(k, group_size))
    back = from_tiles(tiled, bits, group_size, zero_offset, (k, n))
    for name, tensor in vars(packed).items():
        assert torch.equal(getattr(back, name), tensor), name


def test_middle_zeros_are_left_out_and_come_back() -> None:
    packed = random_packed(4, 32, 64, 64, act_order=False)
    packed.qzeros.fill_(0x77777777)
    tiled = to_tiles(packed, 4, 32, 1)
    assert tiled.zeros is None
    assert torch.equal(from_tiles(tiled, 4, 32, 1, (64, 64)).qzeros, packed.qzeros)


@pytest.mark.parametrize("run", [16, 32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_a_lane_holds_the_codes_that_a_tensor_core_wants(bits: int, run: int) -> None:
    """Read the words as the kernels do, by the places that the module's docstring draws."""
    k, n = 128, 64
    qweight = random_words(k // 32 * bits, n)
    codes = unpack_codes(qweight, bits).numpy()
    tiled = tile_codes(qweight, None, bits, run)
    if bits == 4:
        lanes = order_for_lanes(tiled)
        assert torch.equal(order_for_cpu(lanes), tiled)
        tiled = lanes
    tiles = tiled.numpy().astype(np.uint32)
    random = np.random.default_rng(run)
    for _ in range(200):
        k_tile, row_tile, lane, s, i, h = (int(random.integers(x)) for x in (2, 4, 32, 4, 4, 2))
        tile, half = tiles[0, k_tile], i % 2 * 16
        if bits == 4:
            word, bit = (row_tile * 32 + lane) * 4 + s, half + (i // 2 * 2 + h) * 4
            code = tile[word] >> bit & 15
        elif bits == 8:
            vector = row_tile * 2 + s // 2
            word, bit = (vector * 32 + lane) * 4 + s % 2 * 2 + i // 2, half + h * 8
            code = tile[word] >> bit & 255
        else:
            field = s % 2 * 4 + i // 2 * 2 + h
            code = tile[(row_tile * 32 + lane) * 2 + s // 2] >> (half + 2 * field) & 3
            if bits == 3:
                place = (2 + 2 * (field % 4) + field // 4 + 8 * (s // 2)) % 16
                code |= (tile[256 + row_tile * 32 + lane] >> (half + place) & 1) << 2
        q, steps = lane % 4, run // 16
        at = k_tile * 64 + s // steps * run + q * run // 4 + s % steps * 4 + i
        assert code == codes[at, row_tile * 16 + h * 8 + lane // 4]


def test_a_vector_of_the_cpu_holds_four_inputs_of_many_outputs() -> None:
    qweight = random_words(16, 128)
    codes = unpack_codes(qweight, 4)
    tiles = tile_codes(qweight, None, 4, 32).view(torch.uint8).view(2, 2, 2, 4, 4, 16, 4)
    for n_tile, k_tile, pair, step, q, line, byte in torch.cartesian_prod(
        *(torch.arange(size) for size in (2, 2, 2, 4, 4, 16, 4))
    )[::7].tolist():
        both = int(tiles[n_tile, k_tile, pair, step, q, line, byte])
        k = k_tile * 64 + step // 2 * 32 + q * 8 + step % 2 * 4 + byte % 2 * 2 + byte // 2
        n = n_tile * 64 + pair * 32 + line // 8 * 16 + line % 8
        assert (both & 15, both >> 4) == (codes[k, n], codes[k, n + 8])


@pytest.mark.parametrize(
    ("group_size", "k", "run"),
    [(16, 128, 16), (48, 96, 16), (32, 64, 32), (96, 288, 32), (128, 256, 64), (-1, 96, 64)],
)
def test_a_run_never_leaves_its_group(group_size: int, k: int, run: int) -> None:
    assert run_length(group_size, k) == run


def test_what_cannot_be_tiled_is_refused_with_a_reason() -> None:
    assert find_obstacle(4, 128) is None
    assert find_obstacle(4, -1) is None
    assert find_obstacle(5, 128) == "bits is 5, not 2, 3, 4 or 8"
    assert find_obstacle(4, 24) == "group_size is 24, which is not a multiple of 16"
    ragged = trivial_g_idx(64, 32)
    ragged[0] = 1
    assert sort_groups(ragged, 32) == (None, "g_idx does not give each group 32 inputs")
    packed = random_packed(4, 32, 64, 32, act_order=False)
    with pytest.raises(ValueError, match="g_idx does not give each group 32 inputs"):
        to_tiles(GPTQTensors(packed.qweight, packed.qzeros, packed.scales, ragged), 4, 32, 1)


def test_whole_tiles_are_not_copied_for_padding() -> None:
    whole = torch.zeros(64, 128)
    assert pad(pad(whole, 0), 1) is whole
    assert pad(whole[:, :96], 1).shape == (64, 128)
