import pytest
import torch

from auto_gptq.formats.grid import Grid, GridRule

ALL_BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
BOTH_KINDS = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def _min_max(rule: GridRule, weight: torch.Tensor) -> Grid:
    return rule.span(weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0))


def _reached(rule: GridRule, weight: torch.Tensor) -> torch.Tensor:
    """Give the weights [n, N] after rounding to their grid."""
    grid = _min_max(rule, weight)
    codes = grid.to_codes(weight)
    assert ((codes >= 0) & (codes <= rule.maxq) & (codes == codes.round())).all()
    return grid.from_codes(codes)


@ALL_BITS
@BOTH_KINDS
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_min_max_grids_miss_no_weight_by_more_than_a_step(
    bits: int, symmetric: bool, shift: float
) -> None:
    rule = GridRule(bits, symmetric)
    weight = torch.randn(64, 50) + shift
    step = _min_max(rule, weight).scale
    # A symmetric grid has one level more below zero; above, the largest weight is half a step out.
    # Rounding the scale to fp16 moves the outermost level by up to 2^-11 of its distance.
    allowed = 0.5 + rule.maxq / 2**11
    assert ((_reached(rule, weight) - weight).abs() <= step * allowed).all()


def test_scales_are_what_the_checkpoint_will_hold() -> None:
    scale = _min_max(GridRule(4, scale_dtype=torch.float16), torch.randn(32, 20)).scale
    assert torch.equal(scale, scale.half().float())


@BOTH_KINDS
def test_a_group_of_zeros_stays_zero(symmetric: bool) -> None:
    assert not _reached(GridRule(4, symmetric), torch.zeros(32, 3)).any()


@BOTH_KINDS
@pytest.mark.parametrize("size", [1e-9, 1e9], ids=["below fp16", "above fp16"])
def test_weights_out_of_the_reach_of_fp16_scales_give_finite_grids(
    symmetric: bool, size: float
) -> None:
    back = _reached(GridRule(4, symmetric), torch.randn(32, 3) * size)
    assert torch.isfinite(back).all()


def test_zero_points_of_v1_are_never_0() -> None:
    weight = torch.rand(32, 50) + 0.1  # all positive: min-max alone would choose zero point 0
    assert (_min_max(GridRule(4, symmetric=False), weight).zero >= 1).all()
    assert (_min_max(GridRule(4, symmetric=False, lowest_zero=0), weight).zero == 0).all()


@ALL_BITS
@BOTH_KINDS
def test_a_negative_share_gives_the_grid_of_the_mirrored_weights(
    bits: int, symmetric: bool
) -> None:
    rule = GridRule(bits, symmetric)
    weight = torch.randn(64, 50) + 0.5
    low, high = weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0)
    mirrored, twin = rule.part(low, high, -0.8), rule.part(-high, -low, 0.8)
    assert (mirrored.scale < 0).all()
    there = mirrored.from_codes(mirrored.to_codes(weight))
    assert torch.equal(there, -twin.from_codes(twin.to_codes(-weight)))


def test_only_symmetric_grids_are_tried_with_negative_scales() -> None:
    """An asymmetric grid can put its levels where it likes by its zero point."""
    assert min(GridRule(4, signed=True).factors) < 0
    assert min(GridRule(4, symmetric=False, signed=True).factors) > 0
    assert min(GridRule(4).factors) > 0
    assert min(GridRule(8, signed=True).factors) > 0  # the 257th level is worth nothing
