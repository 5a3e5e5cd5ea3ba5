// x W^T from tiles (auto_gptq/formats/tiles.py) with x in whole numbers, for any length of vectors.
//
// A file tiles_*.cpp includes this under the target of one instruction set and gives a struct Set:
//
//   lanes                      32-bit words in a vector
//   rows_at_once               rows of x that share codes in registers, where there are many
//   takes_bytes                whether dot<kNibbles> may be given any codes up to 255
//   dot<KIND>(c, x)            word by word, the sum of four products of bytes, over all vectors:
//                              codes are unsigned, x is signed
//   dot_all<KIND>(c, x)        the same of eight vectors c, each times one word of x
//   repeat(s)                  s[0], s[1], s[2], s[3] over and over
//   widen_half(h)              eight float16 to float
//
// All of it is in an unnamed namespace, as each of those files needs its own code.
//
// x is whole numbers times a scale: one TERM of a byte, or two, 128 h + l.
// A row tile is 16 outputs.  Its line i is the 64 codes of output i and those of i + 8 in one tile.
#pragma once

#include "tiles_unfold.h"

namespace auto_gptq {
namespace {

constexpr int64_t kSpan = 8;    // tiles of the inputs that few rows take at once
constexpr int64_t kAhead = 16;  // tiles that are fetched ahead
constexpr int64_t kBlock = 16;  // tiles that are unfolded at once: 16 KB

// What the largest code is: 15, or 255 while every other byte of x is 0, or 255.
enum Kind { kNibbles, kSparse, kBytes };

template <class Set>
using VW = Words<Set::lanes>;
template <class Set>
using VI = Ints<Set::lanes>;
template <class Set>
using VF = Floats<Set::lanes>;
template <class Set>
constexpr int kParts = 16 / Set::lanes;

template <int LANES>
AUTO_GPTQ_INLINE float sum_of(Floats<LANES> value) {
  alignas(64) float part[LANES];
  store(part, value);
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      part[i] += part[i + width];
    }
  }
  return part[0];
}

// The highest bits of 3-bit codes, for part p of a line, at bit 2 of the lower two bytes' places;
// the upper two's are at bit 3, seven below their place.
template <int LANES>
AUTO_GPTQ_INLINE Words<LANES> spread_high(const uint32_t* words, int p, int output) {
  Words<LANES> high, right;
#pragma GCC unroll 16
  for (int j = 0; j < LANES; ++j) {
    const int at = p * LANES + j, half = at / 8, q = at % 8 / 2, w = at % 2;
    high[j] = words[q];
    right[j] = (2 * output + 4 * half + 8 * w + 16) % 16;
    if (right[j] == 14) right[j] = 30;  // bits 0 and 1: two to the left
  }
  const Words<LANES> turned = high >> right | high << ((32 - right) & 31);
  return (turned & 0x00040004) | ((turned & 0x00080008) << 7);
}

// Whether r1's codes come as r0's plus 16 times their own: the product is parted afterwards.
template <class Set, int BITS>
constexpr bool kBoth = BITS == 4 && Set::takes_bytes;

// Part p of the codes of line i with 2, 3 or 4 bits, each word four of one output.
template <class Set, int BITS>
AUTO_GPTQ_INLINE void read_line(const uint32_t* codes,  // of the row tile
                                const uint32_t* high,   // with 3 bits, their highest
                                int i,
                                int p,
                                VW<Set>& r0,
                                VW<Set>& r1) {
  constexpr int L = Set::lanes;
  if constexpr (BITS == 4) {
    const VW<Set> words = load<VW<Set>>(codes + i * 16 + p * L);
    r0 = words & 0x0f0f0f0f;
    r1 = kBoth<Set, BITS> ? words : words >> 4 & 0x0f0f0f0f;
  } else {
    const uint32_t* words = codes + i * 8;
    VW<Set> low;
    if constexpr (L == 16) {
      const Words<8> a = load<Words<8>>(words), b = a >> 4;
      low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
      low = load<VW<Set>>(words) >> (p * 4);
    }
    r0 = low & 0x03030303;
    r1 = low >> 2 & 0x03030303;
    if constexpr (BITS == 3) {
      r0 |= spread_high<L>(high + i * 4, p, 0);
      r1 |= spread_high<L>(high + i * 4, p, 1);
    }
  }
}

// Sums of a row tile: lanes of 16 outputs, and what zero points take away.
template <class Set>
struct Sums {
  VF<Set> lanes[kRows];
  Floats<8> zeros[2];
};

template <int L>
AUTO_GPTQ_INLINE Floats<L> to_floats(Ints<L> whole) {
  return __builtin_convertvector(whole, Floats<L>);
}

// Into the second-level cache: the first has too few requests open to keep memory busy.
AUTO_GPTQ_INLINE void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Codes times whole numbers 128 h + l.
template <class Set, Kind KIND, int N>
AUTO_GPTQ_INLINE VI<Set> multiply_line(const VW<Set> (&codes)[N], const VW<Set> (&x)[2][N]) {
  return (Set::template dot<KIND>(codes, x[0]) << 7) + Set::template dot<KIND>(codes, x[1]);
}

// x of UNIT tiles, or of a half of one, both terms.
template <class Set, int UNIT, int PARTS>
AUTO_GPTQ_INLINE void read_x(const int8_t* x, int bytes, VW<Set> (&to)[2][UNIT * PARTS]) {
#pragma GCC unroll 2
  for (int term = 0; term < 2; ++term) {
#pragma GCC unroll 2
    for (int u = 0; u < UNIT; ++u) {
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; ++p) {
        to[term][u * PARTS + p] = load<VW<Set>>(x + (2 * u + term) * bytes + p * 4 * Set::lanes);
      }
    }
  }
}

// Add a row tile's UNIT tiles from `tile` on, which have one scale per output, or, SPLIT, one for
// each half of their words.
template <class Set, int BITS, bool SPLIT, int UNIT>
AUTO_GPTQ_INLINE void add_unit(const uint32_t* tile,
                               int row_tile,
                               const int8_t* x,
                               const float (&scale)[2][kRows],
                               VF<Set> (&sum)[kRows]) {
  constexpr int L = Set::lanes, P = kParts<Set>, kXBytes = bytes_of_x(BITS, true);
  constexpr int64_t kTileWords = 128 * BITS;
  const uint32_t* rows = tile + row_tile * (BITS == 3 ? 64 : 32 * BITS);
  if constexpr (BITS == 8) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      VW<Set> x0[2][P], x1[2][P];
      read_x<Set, 1, P>(x + half * 128, kXBytes, x0);
      read_x<Set, 1, P>(x + half * 128 + 64, kXBytes, x1);
      const float(&own)[kRows] = scale[SPLIT ? half : 0];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const uint32_t* line = rows + half * 128 + i * 16;
        fetch(line + kAhead * kTileWords);
        VW<Set> codes[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          codes[p] = load<VW<Set>>(line + p * L);
        }
        sum[i] += to_floats<L>(multiply_line<Set, kSparse>(codes, x0)) * own[i];
        sum[i + 8] += to_floats<L>(multiply_line<Set, kSparse>(codes, x1)) * own[i + 8];
      }
    }
  } else {
    const uint32_t* high = tile + 256 + row_tile * 32;
    VW<Set> own[2][UNIT * P];
    read_x<Set, UNIT, P>(x, kXBytes, own);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      VW<Set> r0[UNIT * P], r1[UNIT * P];
#pragma GCC unroll 2
      for (int u = 0; u < UNIT; ++u) {
        const uint32_t* from = rows + u * kTileWords;
        if (BITS == 4 || i % 2) {
          fetch(from + kAhead * kTileWords + i * (BITS == 4 ? 16 : 8));
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          read_line<Set, BITS>(from, high + u * kTileWords, i, p, r0[u * P + p], r1[u * P + p]);
        }
      }
      const VI<Set> whole0 = multiply_line<Set, kNibbles>(r0, own);
      VI<Set> whole1 = multiply_line<Set, kNibbles>(r1, own);
      if constexpr (kBoth<Set, BITS>) {
        whole1 -= whole0;
      }
      if constexpr (SPLIT) {
        const int turn = BITS == 4 ? 2 : 1;  // words that follow one another in a half
        const auto mixed = [&](int r) __attribute__((always_inline)) {
          const float a = scale[0][r], b = scale[1][r];
          const float words[4] = {a, turn == 2 ? a : b, turn == 2 ? b : a, b};
          return Set::repeat(words);
        };
        sum[i] += to_floats<L>(whole0) * mixed(i);
        sum[i + 8] += to_floats<L>(whole1) * mixed(i + 8);
      } else {
        sum[i] += to_floats<L>(whole0) * scale[0][i];
        sum[i + 8] += to_floats<L>(whole1) * scale[0][i + 8];
      }
    }
  }
}

// Add row m of x times outputs n .. n + 15, the tiles [begin, end) of the inputs.
template <class Set, int BITS, bool SPLIT, int UNIT>
void add_row_tile(const Tiled& w,
                  const Rounded& x,
                  int64_t m,
                  int64_t n,
                  int64_t begin,
                  int64_t end,
                  Sums<Set>& sums) {
  constexpr int64_t kTileWords = 128 * BITS;
  const int64_t tiles = tiles_of(w.k);
  const uint32_t* tile = w.tiles + (n / kSide * tiles + begin) * kTileWords;
  const int row_tile = static_cast<int>(n % kSide / kRows);
  VF<Set> sum[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r] = sums.lanes[r];
  }
  Floats<8> zeros[2] = {sums.zeros[0], sums.zeros[1]};
  Grid grid = {};
  int64_t group = -1;
  for (int64_t t = begin; t < end; t += UNIT, tile += UNIT * kTileWords) {
    const int64_t at = m * tiles + t;
    float scale[2][kRows];
#pragma GCC unroll 2
    for (int half = 0; half < (SPLIT ? 2 : 1); ++half) {
      const int64_t g = group_at(w, t * kSide + half * (kSide / 2));
      if (g != group) {
        group = g;
        read_grid<Set>(w, g, n, grid);
      }
      float x_sum = x.sums[at * 2 + half];
      for (int i = 1; !SPLIT && i < 2 * UNIT; ++i) {
        x_sum += x.sums[at * 2 + i];
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Floats<8> own = load<Floats<8>>(grid.scale + 8 * i);
        zeros[i] += own * load<Floats<8>>(grid.zero + 8 * i) * x_sum;
        const float x_scale = x.scales[at * 2];
        store(scale[half] + 8 * i, own * (i && kBoth<Set, BITS> ? x_scale / 16 : x_scale));
      }
    }
    add_unit<Set, BITS, SPLIT, UNIT>(tile, row_tile, x.codes + at * 2 * bytes_of_x(BITS, true),
                                     scale, sum);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums.lanes[r] = sum[r];
  }
  sums.zeros[0] = zeros[0];
  sums.zeros[1] = zeros[1];
}

// y += row m of x times outputs [begin, end), of one row of tiles.  Blocks of inputs go through all
// outputs, so that memory is read nearly in order.
template <class Set, int BITS>
void multiply_few(
    const Tiled& w, const Rounded& x, int64_t m, int64_t begin, int64_t end, float* y) {
  constexpr int kUnit = BITS == 8 ? 1 : 2;
  const int64_t tiles = tiles_of(w.k);
  Sums<Set> sums[4] = {};
  for (int64_t t = 0; t < tiles; t += kSpan) {
    const int64_t stop = std::min(t + kSpan, tiles);
    const int64_t whole = x.unit > 1 && kUnit > 1 ? stop - (stop - t) % kUnit : t;
    for (int64_t n = begin; n < end; n += kRows) {
      Sums<Set>& own = sums[(n - begin) / kRows];
      if (w.run < kSide) {
        add_row_tile<Set, BITS, true, 1>(w, x, m, n, t, stop, own);
      } else {
        if constexpr (kUnit > 1) {
          add_row_tile<Set, BITS, false, kUnit>(w, x, m, n, t, whole, own);
        }
        add_row_tile<Set, BITS, false, 1>(w, x, m, n, whole, stop, own);
      }
    }
  }
  for (int64_t n = begin; n < end; n += kRows) {
    const Sums<Set>& own = sums[(n - begin) / kRows];
    for (int r = 0; r < kRows; ++r) {
      y[n + r] += sum_of<Set::lanes>(own.lanes[r]) - own.zeros[r / 8][r % 8];
    }
  }
}

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

template <class Set, int BITS>
void multiply(const Tiled& w, const Rounded& x, float* y, int64_t begin, int64_t end) {
  if (x.few) {
    for (int64_t n = begin, next; n < end; n = next) {
      next = std::min(n / kSide * kSide + kSide, end);
      for (int64_t m = 0; m < x.m; ++m) {
        multiply_few<Set, BITS>(w, x, m, n, next, y + m * w.n);
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
  if (w.bits == 4) return multiply<Set, 4>(w, x, y, begin, end);
  if (w.bits == 8) return multiply<Set, 8>(w, x, y, begin, end);
}

}  // namespace
}  // namespace auto_gptq
