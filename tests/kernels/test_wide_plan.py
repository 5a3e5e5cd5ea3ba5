"""How a product of many rows is parted between blocks of Hopper: all of it, and each part once."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESSORS = 132  # of an H100

SOURCE = r"""
#include "cuda/q_wide_plan.h"
using namespace auto_gptq::wide;
extern "C" void plan(int64_t m, int64_t n, int64_t k, int processors, Work* work) {
  *work = choose(m, n, k, processors);
}
extern "C" bool part(const Work* work, int block, int turn, Part* part) {
  return part_of(*work, block, turn, *part);
}
"""


class Work(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in (
                *("rows", "columns", "m_blocks", "n_blocks", "stages"),
                *("pairs", "turns", "group", "more", "length", "lead"),
            )
        ),
        ("divisors", ctypes.c_uint32 * 8),
    ]


class Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("m", "n", "begin", "end")),
        *((name, ctypes.c_bool) for name in ("gives", "takes")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, "plan.cpp", "-o", "plan.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "plan.so"))
    library.part.restype = ctypes.c_bool
    return library


def plan(library: ctypes.CDLL, m: int, n: int, k: int, processors: int = PROCESSORS) -> Work:
    work = Work()
    library.plan(*map(ctypes.c_int64, (m, n, k)), processors, ctypes.byref(work))
    return work


def parts(library: ctypes.CDLL, work: Work, block: int) -> list[Part]:
    """Give what a block computes, by turns."""
    found: list[Part] = []
    part = Part()
    while library.part(ctypes.byref(work), block, len(found), ctypes.byref(part)):
        found.append(Part.from_buffer_copy(part))
        assert len(found) <= work.m_blocks * work.n_blocks
    return found


def check(library: ctypes.CDLL, m: int, n: int, k: int, processors: int) -> Work:
    work = plan(library, m, n, k, processors)
    all_stages = -(-k // 64)
    assert 0 < work.pairs <= max(processors // 2, 1)
    stages: set[tuple[int, int, int]] = set()
    given: dict[tuple[int, int], int] = {}  # by which pair
    taken: dict[tuple[int, int], int] = {}
    for pair in range(work.pairs):
        mine, other = (parts(library, work, 2 * pair + rank) for rank in (0, 1))
        for a, b in zip(mine, other, strict=True):  # the same rows of x and inputs for both blocks
            assert (a.m, a.n + work.columns, a.begin, a.end) == (b.m, b.n, b.begin, b.end)
            assert (a.gives, a.takes) == (b.gives, b.takes) == (a.end < all_stages, a.begin > 0)
            for part in (a, b):
                assert part.begin < part.end
                new = {(part.m, part.n, stage) for stage in range(part.begin, part.end)}
                assert not new & stages
                stages |= new
        for place, part in enumerate(mine):
            if part.gives:
                assert place == work.turns and not part.takes
                given[part.m, part.n] = pair
            if part.takes:
                assert part is mine[-1]
                taken[part.m, part.n] = pair
    assert {result: pair + 1 for result, pair in given.items()} == taken
    outputs = range(0, -(-n // (2 * work.columns)) * 2 * work.columns, work.columns)
    blocks = {(i, j) for i in range(0, m, work.rows) for j in outputs}
    assert stages == {(i, j, stage) for i, j in blocks for stage in range(all_stages)}
    return work


def longest(library: ctypes.CDLL, work: Work) -> int:
    return max(
        sum(part.end - part.begin for part in parts(library, work, 2 * pair))
        for pair in range(work.pairs)
    )


def test_every_stage_of_every_result_is_computed_once(library: ctypes.CDLL) -> None:
    draw = random.Random(0)
    dealt = 0
    for _ in range(60):
        m, n, k = draw.randint(1, 3000), 32 * draw.randint(1, 500), 32 * draw.randint(1, 100)
        work = check(library, m, n, k, draw.choice([PROCESSORS, PROCESSORS, 114, 7, 1]))
        dealt += work.more != 0
    assert dealt > 20


@pytest.mark.parametrize("n", [4096, 11008, 14336])
@pytest.mark.parametrize("m", [256, 512, 1024])
def test_multiprocessors_are_busy_most_of_the_time(library: ctypes.CDLL, m: int, n: int) -> None:
    work = check(library, m, n, 4096, PROCESSORS)
    results = work.m_blocks * work.n_blocks
    least = 0.9 if results > PROCESSORS // 2 else 0.75
    assert results * work.stages > least * longest(library, work) * PROCESSORS // 2


def test_few_stages_are_not_dealt_out(library: ctypes.CDLL) -> None:
    assert check(library, 130, 256, 64, PROCESSORS).more == 0
    assert check(library, 130, 256, 4096, PROCESSORS).more == 1
