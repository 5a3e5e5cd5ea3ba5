import dataclasses

import pytest
import torch
from torch import Tensor

from auto_gptq.errors import FactorizationError, NumericsError
from auto_gptq.formats.grid import GridRule
from auto_gptq.quantization.factor import factorize, invert_upper
from auto_gptq.quantization.hessian import Hessian, Pull
from auto_gptq.quantization.solver import (
    SolverOptions,
    round_to_nearest,
    solve,
    squared_error,
)
from tests.reference import plain_gptq


def _layer(rows: int = 24, columns: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of uneven size."""
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    x = (torch.randn(3 * columns, columns) * torch.linspace(0.1, 2, columns)) @ mix
    return torch.randn(rows, columns), x.t() @ x / len(x)


SETTINGS = [
    pytest.param(
        SolverOptions(GridRule(bits, sym, signed="signed" in name), group, 0.01, order, static),
        id=name,
    )
    for name, bits, sym, group, order, static in [
        ("4bit_g32", 4, True, 32, False, False),
        ("4bit_g32_act", 4, True, 32, True, False),
        ("4bit_g64_act_static", 4, True, 64, True, True),
        ("4bit_g64_act_static_signed", 4, True, 64, True, True),
        ("3bit_g32_signed", 3, True, 32, False, False),
        ("4bit_one_group_act", 4, True, -1, True, False),
        ("4bit_g48_ragged", 4, True, 48, True, False),
        ("3bit_g32_asym", 3, False, 32, False, False),
        ("2bit_g32_asym_act", 2, False, 32, True, False),
        ("8bit_g160", 8, True, 160, False, False),
    ]
]


@pytest.mark.parametrize("options", SETTINGS)
def test_codes_are_those_of_plain_fp64_gptq(options: SolverOptions, device: torch.device) -> None:
    weight, hessian = _layer()
    found = solve(weight.to(device), hessian.to(device), options)
    order = torch.arange(160)
    if options.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    group = found.g_idx.long().cpu()
    scales, zeros = found.scales.cpu()[:, group], found.zeros.cpu()[:, group]
    codes = plain_gptq(weight, hessian, scales, zeros, options.rule.maxq, 0.01, order)
    # fp32 rounds a weight that lies between two codes to either side, after which its row goes on
    # differently: very few rows may.
    differing = (found.codes.cpu() != codes).any(1).sum()
    assert differing <= 2
    ours = squared_error(weight, found.dequantize().cpu(), hessian)
    theirs = squared_error(weight, (codes - zeros) * scales, hessian)
    assert ours <= theirs * 1.001


@pytest.mark.parametrize("options", SETTINGS)
def test_solving_beats_rounding(options: SolverOptions) -> None:
    weight, hessian = _layer()
    solved = solve(weight, hessian, options).dequantize()
    rounded = round_to_nearest(weight, hessian, options).dequantize()
    assert squared_error(weight, solved, hessian) < squared_error(weight, rounded, hessian)


@pytest.mark.parametrize("options", SETTINGS)
def test_the_stated_loss_is_the_error_under_the_damped_hessian(options: SolverOptions) -> None:
    weight, hessian = _layer()
    found = solve(weight, hessian, options)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    error = squared_error(weight, found.dequantize(), damped)
    assert found.loss.sum().item() == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize("options", SETTINGS)
def test_rows_are_solved_independently_so_layers_of_one_input_can_be_stacked(
    options: SolverOptions,
) -> None:
    weight, hessian = _layer()
    together = solve(weight, hessian, options)
    alone = solve(weight[8:16], hessian, options)
    part = together.rows(8, 16)
    assert (part.codes != alone.codes).any(1).sum() <= 1
    assert torch.equal(part.g_idx, alone.g_idx)


def test_negative_scales_lower_the_error() -> None:
    weight, hessian = _layer(rows=64)
    options = SolverOptions(GridRule(3), 32, 0.01, act_order=True, static_groups=True)
    signed = dataclasses.replace(options, rule=GridRule(3, signed=True))
    errors = [
        squared_error(weight, solve(weight, hessian, o).dequantize(), hessian)
        for o in (options, signed)
    ]
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_a_corrected_weight_gives_the_outputs_of_the_full_precision_model(act_order: bool) -> None:
    """With 8 bits hardly anything is lost by rounding, so what is left is the correction's."""
    weight = torch.randn(24, 160)
    exact = torch.randn(9000, 160) * torch.linspace(0.3, 2, 160)
    x = exact + 0.3 * exact @ torch.randn(160, 160) / 160**0.5  # of the quantized model
    hessian = Hessian(160, x.device)
    hessian.add(x.view(9, 1000, 160))
    hessian.compare(x.view(9, 1000, 160), None, exact.view(9, 1000, 160))
    options = SolverOptions(GridRule(8), 32, 1e-4, act_order=act_order, static_groups=True)
    wanted = exact @ weight.t()

    def missed(correction: float) -> float:
        changed = dataclasses.replace(options, correction=correction)
        pull = Pull(hessian.pull(weight), hessian.doubt(weight))
        found = solve(weight, hessian.mean(), changed, lambda: pull).dequantize()
        return float((x @ found.t() - wanted).norm() / wanted.norm())

    best = torch.linalg.lstsq(x, wanted).solution  # nothing linear can do better than that
    bound = float((x @ best - wanted).norm() / wanted.norm())
    assert missed(1.0) < max(1.1 * bound, 0.02)
    assert missed(1.0) < 0.2 * missed(0.0)
    assert missed(0.5) == pytest.approx(missed(0.0) / 2, rel=0.2)


@pytest.mark.parametrize("parts", [1, 2], ids=["at once", "merged"])
def test_a_pull_is_the_mean_of_what_outputs_lack_times_inputs(parts: int) -> None:
    """Said of the inputs or of the outputs; each half of a batch is summed up apart."""
    weight = torch.randn(24, 40)
    exact, x = torch.randn(2, 4, 50, 40)
    keep = torch.rand(4, 50) < 0.8
    lack = (exact - x) @ weight.t()
    by_inputs, by_outputs = Hessian(40, x.device), Hessian(40, x.device)
    for part in torch.arange(4).chunk(parts):
        for whole, more in ((by_inputs, None), (by_outputs, lack[part])):
            some = Hessian(40, x.device)
            some.add(x[part], keep[part])
            some.compare(x[part], keep[part], exact[part], more)
            whole.merge(some)
    by_outputs.add(x, keep)  # tokens that nobody has compared
    doubts = torch.zeros(24, 40, dtype=torch.float64)
    for part in torch.arange(4).chunk(parts):
        rows, lacks = x[part][keep[part]].double(), lack[part][keep[part]].double()
        half = len(rows) // 2
        doubts += lacks[:half].t() @ rows[:half] - lacks[half:].t() @ rows[half:]
    expected = lack[keep].double().t() @ x[keep].double() / keep.sum()
    some_rows = slice(8, 24)
    for hessian in (by_inputs, by_outputs):
        assert hessian.is_compared
        assert torch.allclose(hessian.pull(weight).double(), expected, atol=1e-5)
        assert torch.allclose(hessian.pull(weight, some_rows).double(), expected[8:], atol=1e-5)
        doubt = hessian.doubt(weight, some_rows).double()
        assert torch.allclose(doubt, doubts[8::8] / keep.sum(), atol=1e-5)
    assert by_outputs.tokens == 2 * by_inputs.tokens


def test_what_few_tokens_say_by_chance_is_not_followed() -> None:
    """Noise as large as the drift must not spoil the outputs, on tokens that were not seen."""
    weight = torch.randn(24, 160)
    turn = 0.3 * torch.randn(160, 160) / 160**0.5
    exact = torch.randn(2, 400, 160)
    noisy = exact + exact @ turn + 0.6 * torch.randn(2, 400, 160)
    hessian = Hessian(160, exact.device)
    hessian.add(noisy[0])
    hessian.compare(noisy[0], None, exact[0])
    options = SolverOptions(GridRule(8), 32, 1e-4, static_groups=True, correction=1.0)
    pull = Pull(hessian.pull(weight), hessian.doubt(weight))
    followed = pull.whole @ torch.linalg.inv(hessian.mean())  # all that it says
    careful = solve(weight, hessian.mean(), options, lambda: pull).dequantize()

    def missed(changed: Tensor) -> float:
        return float((noisy[1] @ changed.t() - exact[1] @ weight.t()).norm())

    assert missed(careful) < 0.95 * missed(weight)
    assert missed(careful) < 0.95 * missed(weight + followed)


def test_static_groups_keep_g_idx_trivial_and_act_order_alone_does_not() -> None:
    weight, hessian = _layer()
    options = SolverOptions(GridRule(4), 32, act_order=True)
    scattered = solve(weight, hessian, options).g_idx
    static = solve(weight, hessian, dataclasses.replace(options, static_groups=True)).g_idx
    assert torch.equal(static, torch.arange(160, dtype=torch.int32) // 32)
    assert not torch.equal(scattered, static)
    # The columns of group 0 are those with the largest inputs.
    largest = torch.argsort(hessian.diagonal(), descending=True)[:32]
    assert (scattered[largest] == 0).all()


def test_inputs_that_were_always_zero_are_rounded_and_disturb_nobody() -> None:
    """AutoGPTQ set the weights of such inputs to 0."""
    weight, hessian = _layer()
    dead = torch.tensor([3, 77])
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = solve(weight, hessian, SolverOptions(GridRule(8), -1))
    error = (found.dequantize() - weight)[:, dead].abs()
    assert (error <= found.scales * 0.51).all()


def test_a_hessian_of_too_few_tokens_is_damped_until_it_can_be_factored() -> None:
    x = torch.randn(3, 64) * 1e3
    factor = factorize(x.t() @ x, 1e-9)
    assert torch.isfinite(factor.inverse).all()
    weight = torch.randn(32, 64)
    solved = solve(weight, x.t() @ x, SolverOptions(GridRule(4), 32))
    assert torch.isfinite(solved.dequantize()).all()


def test_an_indefinite_hessian_raises_the_damping_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # one eigenvalue is -0.05
    assert factorize(hessian, 0.01).damp_percent == pytest.approx(0.1)
    assert "not positive definite" in caplog.text
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(NumericsError, match="cannot be factored"):
        factorize(hessian, 0.01)


def test_the_factor_is_the_one_that_gptq_gets_by_inverting() -> None:
    _, hessian = _layer()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    inverse = torch.linalg.inv(damped)
    expected = torch.linalg.cholesky((inverse + inverse.t()) / 2, upper=True)
    assert torch.allclose(factorize(hessian, 0.01).inverse.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    weight, hessian = _layer()
    options = SolverOptions(GridRule(4), 32)
    with pytest.raises(NumericsError, match="inputs hold NaN or infinity"):
        solve(weight, hessian.index_fill(0, torch.tensor([5]), bad), options)
    with pytest.raises(NumericsError, match="full-precision model's activations"):
        corrected = dataclasses.replace(options, correction=0.5)
        solve(weight, hessian, corrected, lambda: Pull(torch.full_like(weight, bad), weight[::8]))
    weight[1, 2] = bad
    with pytest.raises(NumericsError, match="weight holds NaN or infinity"):
        solve(weight, hessian, options)


def test_hessian_is_the_mean_over_kept_tokens() -> None:
    x = torch.randn(2, 5, 32)
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    hessian = Hessian(32, torch.device("cpu"))
    hessian.add(x, keep)
    hessian.add(x.half())
    tokens = torch.cat([x[keep], x.half().float().flatten(0, 1)])
    assert hessian.tokens == len(tokens) == 18
    assert torch.allclose(hessian.mean(), tokens.t() @ tokens / 18, atol=1e-6)


def test_triangular_matrices_are_inverted_by_halves(device: torch.device) -> None:
    matrix = torch.randn(700, 700, dtype=torch.float64, device=device).triu() / 30
    matrix.diagonal().copy_(torch.rand(700) + 1)
    inverse = invert_upper(matrix)
    assert inverse.is_contiguous()
    assert not inverse.tril(-1).any()
    identity = torch.eye(700, dtype=torch.float64, device=device)
    assert torch.allclose(matrix @ inverse, identity, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_of_16_bit_inputs_are_summed_without_rounding_them(
    dtype: torch.dtype, device: torch.device
) -> None:
    x = (torch.randn(300, 96) + 0.5).to(device, dtype)
    hessian = Hessian(96, device)
    hessian.add(x[:100])
    hessian.add(x[100:].view(2, 100, 96))
    exact = x.double().t() @ x.double() / 300
    assert torch.allclose(hessian.mean().double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(hessian.mean(), hessian.mean().t())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [32, 4300, 17024])
@pytest.mark.parametrize("options", SETTINGS)
def test_a_gpu_finds_what_the_cpu_finds(options: SolverOptions, rows: int) -> None:
    """TF32 products move a few codes over an edge, and change the error by less than 0.1 %."""
    weight, hessian = _layer(rows, 480 if rows < 10000 else 160)
    expected = solve(weight, hessian, options)
    found = solve(weight.cuda(), hessian.cuda(), options)
    assert (found.codes.cpu() == expected.codes).float().mean() > 0.97
    assert torch.equal(found.g_idx.cpu(), expected.g_idx)
    few = 1e-2 if rows < 100 else 2e-3
    assert float(found.loss.sum()) == pytest.approx(float(expected.loss.sum()), rel=few)
    lost = squared_error(weight, found.dequantize().cpu(), hessian)
    assert float(lost) == pytest.approx(
        float(squared_error(weight, expected.dequantize(), hessian)), rel=few
    )


@pytest.mark.gpu
@pytest.mark.parametrize("options", SETTINGS)
def test_a_gpu_finds_for_half_the_rows_what_it_finds_for_all(options: SolverOptions) -> None:
    """Ranks solve some rows each, and must find what one process finds."""
    weight, hessian = (x.cuda() for x in _layer(17024, 1440))
    whole = solve(weight, hessian, options, parts=2)
    for start, stop in [(0, 8512), (8512, 17024)]:
        part = solve(weight[start:stop], hessian, options)
        rows = whole.rows(start, stop)
        assert torch.equal(part.codes, rows.codes)
        assert torch.equal(part.scales, rows.scales)
        assert torch.equal(part.loss, rows.loss)


@pytest.mark.gpu
def test_a_large_hessian_is_factored_by_halves() -> None:
    size = 5000
    x = torch.randn(6000, size, device="cuda") * torch.linspace(0.1, 3, size, device="cuda")
    x[:, 7] = 300 * x[:, 8] + x[:, 7]
    hessian = x.t() @ x
    damped = hessian.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    expected = torch.linalg.inv(root)
    found = factorize(hessian, 0.01).inverse.double()
    assert found.is_contiguous()
    assert torch.equal(found, found.triu())
    assert (found - expected).norm() < 2e-3 * expected.norm()
    hessian[3, 3] = -1e6  # cannot be factored by halves, nor at all
    hessian[3, 4] = hessian[4, 3] = 1e7
    with pytest.raises(FactorizationError):
        factorize(hessian, 0.01)
