// x W^T from tiles (auto_gptq/formats/tiles.py) with x in whole numbers, for any length of vectors:
// many rows share codes that are unfolded, 16 outputs and 1024 inputs at a time, except with 4 bits.
#pragma once

#include "tiles_few.h"
#include "tiles_four.h"

namespace auto_gptq {
namespace {

constexpr int64_t kBlock = 16;  // tiles that are unfolded at once: 16 KB

// Unfolded codes of a row tile, and the grids of their halves.
struct Panel {
  alignas(64) uint32_t codes[kBlock][16][kRows];
  Grid grid[kBlock][2];
};

// y of M rows += x times a panel that starts at tile `first`.
template <class Set, Kind KIND, int TERMS, int M>
void multiply_panel(const Panel& panel,
                    int64_t first,
                    int64_t count,
                    bool split,
                    const Rounded& x,
                    int64_t m,
                    int64_t tiles,
                    float* y,
                    int64_t y_stride) {
  constexpr int L = Set::lanes, P = kParts<Set>;
  for (int64_t t = 0; t < count; ++t) {
    VF<Set> sum[M][P] = {};
    float x_sum[M] = {};
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        x_sum[r] += x.sums[((m + r) * tiles + first + t) * 2 + half];
      }
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        VW<Set> codes[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          codes[i] = load<VW<Set>>(panel.codes[t][half * 8 + i] + p * L);
        }
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
          const int64_t at = (m + r) * tiles + first + t;
          const int8_t* from = x.codes + at * TERMS * kSide + half * 32;
          VI<Set> whole = Set::template dot_all<KIND>(codes, from);
          if constexpr (TERMS == 2) {
            whole = (whole << 7) + Set::template dot_all<KIND>(codes, from + kSide);
          }
          sum[r][p] += __builtin_convertvector(whole, VF<Set>) * x.scales[at * 2 + half];
        }
      }
      if (half == 0 && !split) {
        continue;
      }
      const Grid& grid = panel.grid[t][half];
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          float* to = y + (m + r) * y_stride + p * L;
          const VF<Set> scale = load<VF<Set>>(grid.scale + p * L);
          const VF<Set> zero = load<VF<Set>>(grid.zero + p * L);
          store(to, load<VF<Set>>(to) + scale * (sum[r][p] - zero * x_sum[r]));
          sum[r][p] = VF<Set>{};
        }
        x_sum[r] = 0;
      }
    }
  }
}

template <class Set, Kind KIND, int TERMS>
void multiply_many(const Tiled& w, const Rounded& x, int64_t n, float* y) {
  constexpr int M = Set::rows_at_once;
  const int64_t tiles = tiles_of(w.k);
  const bool split = w.run < kSide;
  Panel panel;
  for (int64_t first = 0; first < tiles; first += kBlock) {
    const int64_t count = std::min(kBlock, tiles - first);
    for (int64_t t = 0; t < count; ++t) {
      unfold(w, n, first + t, panel.codes[t][0]);
      for (int half = 0; half < 2; ++half) {
        read_grid<Set>(w, group_at(w, (first + t) * kSide + half * 32), n, panel.grid[t][half]);
      }
    }
    int64_t m = 0;
    for (; m + M <= x.m; m += M) {
      multiply_panel<Set, KIND, TERMS, M>(panel, first, count, split, x, m, tiles, y + n, w.n);
    }
    for (; m < x.m; ++m) {
      multiply_panel<Set, KIND, TERMS, 1>(panel, first, count, split, x, m, tiles, y + n, w.n);
    }
  }
}

template <class Set>
void multiply_four(const Tiled& w, const Rounded& x, float* y, int64_t begin, int64_t end) {
  for (int64_t n = begin, next; n < end; n = next) {
    next = std::min(n / kSide * kSide + kSide, end);
    if (x.terms == 1) {
      multiply_four<Set, 1>(w, x, n, next, y);
    } else {
      multiply_four<Set, 2>(w, x, n, next, y);
    }
  }
}

// The same for 2, 3 and 8 bits.
template <class Set, int BITS>
void multiply(const Tiled& w, const Rounded& x, float* y, int64_t begin, int64_t end) {
  if (x.few) {
    for (int64_t n = begin, next; n < end; n = next) {
      next = std::min(n / kSide * kSide + kSide, end);
      if (BITS != 8 && x.terms == 1) {
        multiply_few_rows<Set, BITS, BITS == 8 ? 2 : 1>(w, x, n, next, y);
      } else {
        multiply_few_rows<Set, BITS, 2>(w, x, n, next, y);
      }
    }
    return;
  }
  constexpr Kind kKind = BITS == 8 ? kBytes : kNibbles;
  for (int64_t n = begin; n < end; n += kRows) {
    if (x.terms == 1) {
      multiply_many<Set, kKind, 1>(w, x, n, y);
    } else {
      multiply_many<Set, kKind, 2>(w, x, n, y);
    }
  }
}

template <class Set>
void multiply_tiles(const Tiled& w, const Rounded& x, float* y, int64_t begin, int64_t end) {
  if (w.bits == 2) return multiply<Set, 2>(w, x, y, begin, end);
  if (w.bits == 3) return multiply<Set, 3>(w, x, y, begin, end);
  if (w.bits == 4) return multiply_four<Set>(w, x, y, begin, end);
  if (w.bits == 8) return multiply<Set, 8>(w, x, y, begin, end);
}

}  // namespace
}  // namespace auto_gptq
