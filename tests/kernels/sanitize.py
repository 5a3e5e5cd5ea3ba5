"""Run every kernel of one family once, on sizes small enough for a tool that watches each access.

    python -m tests.kernels.sanitize few

``sanitize.sh`` runs it under compute-sanitizer.  Results are other tests' business.
"""

from __future__ import annotations

import sys

import torch

from auto_gptq.kernels import decode_ops, expert_ops
from tests.kernels import test_q_mma
from tests.kernels.test_decode_ops import attention_case
from tests.kernels.test_expert_ops import ends_of, random_experts, stacked
from tests.kernels.test_ops import GROUP, _block, _groups
from tests.kernels.test_q_matmul import multiply
from tests.kernels.test_tile_ops import BITS, OPS, operands, random_weight

DEVICE = torch.device("cuda")


def products(rows: tuple[int, ...], k: int, n: int) -> None:
    for bits in BITS:
        for group_size, act_order in ((32, True), (64, False)):
            settings = bits, group_size, k, n
            _, tiled = random_weight(*settings, DEVICE, act_order=act_order)
            for m in rows:
                multiply(torch.randn(m, k, device=DEVICE).half(), tiled, settings)


def few() -> None:
    products((1, 5, 16), 192, 96)


def dozens() -> None:
    products((24, 100), 192, 96)


def hundreds() -> None:
    products((150, 300), 192, 96)


def shared() -> None:
    """Sums that blocks give each other, and rings that go round, which racecheck misjudges.

    It does not follow the barriers by which blocks of a cluster tell each other what is empty.
    """
    products((150, 300), 1088, 96)


def mma() -> None:
    for bits in BITS:
        for group_size in (32, 128):
            settings = bits, group_size, 1024, 64  # long enough to be shared out
            _, tiled = random_weight(*settings, DEVICE)
            for m in (20, 50):
                x = torch.randn(m, 1024, device=DEVICE).half()
                test_q_mma.multiply(x, tiled, settings, None)


def tiles() -> None:
    for bits in BITS:
        for act_order in (False, True):
            settings = bits, 32, 96, 64
            packed, tiled = random_weight(*settings, DEVICE, act_order=act_order)
            OPS.repack_tiles(packed.qweight, tiled.perm, bits, 32)
            OPS.dequantize_tiles(*operands(tiled), *settings, torch.float16)


def experts() -> None:
    for bits in BITS:
        settings = bits, 32, 192, 64
        weights = stacked(random_experts(4, settings, DEVICE, act_order=True))
        for sizes in ([1, 0, 2, 1], [9, 20, 0, 3], [40, 70, 0, 1]):
            x = torch.randn(sum(sizes), 192, device=DEVICE).half()
            OPS.q_experts(x, None, ends_of(sizes, DEVICE), *weights, None, *settings, False)


def routes() -> None:
    assert expert_ops
    index = torch.randint(9, (40, 2), device=DEVICE)
    _, places, _ = OPS.sort_by_expert(index, 8)
    y = torch.randn(80, 64, device=DEVICE).half()
    OPS.combine_experts(y, places, torch.rand(40, 2, device=DEVICE))


def decode() -> None:
    case = attention_case(4, 2, 64, 64, torch.float16, norms=True)
    case = {k: v.cuda() if torch.is_tensor(v) else v for k, v in case.items()}
    partial, arrived = decode_ops.decode_scratch(3, 4, 2, 64, DEVICE)
    OPS.decode_attention(**case, partial=partial, arrived=arrived)
    hidden = torch.randn(2, 64, device=DEVICE).half()
    OPS.add_norm(hidden, hidden.clone(), torch.ones_like(hidden[0]), 1e-5)
    OPS.gate(hidden, False)
    tokens = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    place, ended = torch.tensor([5], device=DEVICE), torch.zeros(2, device=DEVICE).bool()
    OPS.append_best(hidden, tokens, place, ended, place, 7)


def solver() -> None:
    from auto_gptq.formats.grid import GridRule

    block = _block(DEVICE)
    OPS.fit_grids(*_groups(DEVICE, GridRule(4)))
    OPS.solve_columns(**block)
    maxq = block.pop("maxq")
    rest = torch.rand(40, device=DEVICE), torch.ones(1, device=DEVICE), 0, 4, True, 1
    OPS.solve_matrix(*block.values(), *rest, torch.float16)
    codes = block["codes"].t().contiguous().clamp(max=maxq)[:, :GROUP].contiguous()
    OPS.pack_codes(codes, 4)
    scales, g_idx = block["scales"].t().contiguous(), torch.zeros(GROUP, device=DEVICE).int()
    OPS.dequantize_codes(codes, scales, scales.int(), g_idx, torch.float16)


FAMILIES = (few, dozens, hundreds, shared, mma, tiles, experts, routes, decode, solver)

if __name__ == "__main__":
    {each.__name__: each for each in FAMILIES}[sys.argv[1]]()
    torch.cuda.synchronize()
