// x W^T for few rows of x: codes are multiplied as they lie, a line of a row tile at a time.
//
// Line i of a row tile is the codes of outputs i and i + 8, r0 and r1, for the inputs of one tile.
// Lanes hold sums over different inputs of one output; only at the end they are added up.
#pragma once

#include "tiles_set.h"

namespace auto_gptq {
namespace {

constexpr int64_t kTiles = 8;       // of the inputs that a row tile takes at once
constexpr int64_t kFetched = 16384;  // bytes that are fetched ahead: tiles lie in the order of use

// The highest bits of 3-bit codes at bit 2 of their bytes, among others.
template <int L>
AUTO_GPTQ_INLINE Words<L> select_high(Words<L> high, int p, int output) {
  Words<L> right, left;
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) {
    const int place = 2 * output + 4 * ((p * L + j) / 8) + 8 * (j % 2);
    right[j] = place < 14 ? place : 31;  // bits 0 and 1 are to go two to the left
    left[j] = place < 14 ? 31 : 2;
  }
  high = (output ? high >> right | high << left : high >> right) & 0x000c000c;
  return high | high << 7;
}

// Part p of the codes of line i with 2 or 3 bits, each word four of one output.
template <class Set, int BITS>
AUTO_GPTQ_INLINE void read_line(const uint32_t* codes,  // of the row tile
                                const uint32_t* high,   // with 3 bits, their highest
                                int i,
                                int p,
                                VW<Set>& r0,
                                VW<Set>& r1) {
  constexpr int L = Set::lanes;
  const VW<Set> low = Set::repeat_eight(codes + i * 8, p);
  r0 = low & 0x03030303;
  r1 = low >> 2 & 0x03030303;
  if constexpr (BITS == 3) {
    const VW<Set> highest = Set::double_four(high + i * 4);
    r0 |= select_high<L>(highest, p, 0) & 0x04040404;
    r1 |= select_high<L>(highest, p, 1) & 0x04040404;
  }
}

template <int L>
AUTO_GPTQ_INLINE Floats<L> to_floats(Ints<L> whole) {
  return __builtin_convertvector(whole, Floats<L>);
}

// What M rows of x and the outputs of one row of tiles have together.
template <class Set, int M>
struct Sums {
  VF<Set> lanes[kSide][M];
  VF<Set> zeros[kSide / Set::lanes][M];          // what zero points take away from them
  alignas(64) float scales[kTiles][M][2][kSide];  // of a span: weight's times x's, of both halves
};

// A vector of an output's scale, or, SPLIT, of its two scales in the order of a line's words.
template <class Set, bool SPLIT>
AUTO_GPTQ_INLINE VF<Set> spread_scale(const float* scale) {
  const VF<Set> first = scale[0] - VF<Set>{};  // 0 + x would be computed, for x = -0
  if constexpr (!SPLIT) {
    return first;
  }
  const VF<Set> second = scale[kSide] - VF<Set>{};
  VI<Set> later;
#pragma GCC unroll 16
  for (int j = 0; j < Set::lanes; ++j) {
    later[j] = j % 2 ? -1 : 0;
  }
  return later ? second : first;
}

// x of UNIT tiles, or of a half of one, in registers.
template <class Set, int TERMS, int UNIT>
struct Inputs {
  VW<Set> terms[TERMS][UNIT * kParts<Set>];
  VI<Set> shifts;  // of one term: how many bits to the left each lane's sum goes
};

template <class Set, int TERMS, int UNIT, int BYTES>
AUTO_GPTQ_INLINE Inputs<Set, TERMS, UNIT> read_x(const int8_t* x, const int32_t* shifts) {
  Inputs<Set, TERMS, UNIT> own;
#pragma GCC unroll 2
  for (int u = 0; u < UNIT; ++u) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts<Set>; ++p) {
#pragma GCC unroll 2
      for (int term = 0; term < TERMS; ++term) {
        const int8_t* from = x + (TERMS * u + term) * BYTES + p * 4 * Set::lanes;
        own.terms[term][u * kParts<Set> + p] = Set::keep(load<VW<Set>>(from));
      }
    }
  }
  if constexpr (TERMS == 1) {
    own.shifts = Set::repeat_shifts(shifts);
  }
  return own;
}

template <class Set, Kind KIND, int TERMS, int UNIT, int N>
AUTO_GPTQ_INLINE VI<Set> dot(const VW<Set> (&codes)[N], const Inputs<Set, TERMS, UNIT>& x) {
  if constexpr (TERMS == 2) {
    return Set::template dot<KIND>(codes, x.terms[0], x.terms[1]);
  } else {
    return Set::template dot<KIND>(codes, x.terms[0]) << x.shifts;
  }
}

// Where UNIT tiles of a row tile lie, and what they are multiplied by.
struct Place {
  const uint32_t* rows;  // of the row tile
  const uint32_t* high;  // with 3 bits, its highest bits
  const int8_t* x;
  const int32_t* shifts;  // of x, with one term

  template <int BITS, int TERMS, int UNIT>
  AUTO_GPTQ_INLINE void advance() {
    rows += UNIT * 128 * BITS;
    high += UNIT * 128 * BITS;
    x += UNIT * TERMS * bytes_of_x(BITS, true);
    shifts += TERMS == 1 ? UNIT * kShifts : 0;
  }
};

// Add line i of UNIT tiles times a row of x to what outputs i and i + 8 have.  The tiles have one
// scale per output, or, SPLIT, one for each half of their words.
template <class Set, int BITS, bool SPLIT, int TERMS, int UNIT>
AUTO_GPTQ_INLINE void add_line(const VW<Set> (&r0)[UNIT * kParts<Set>],
                               const VW<Set> (&r1)[UNIT * kParts<Set>],
                               const Inputs<Set, TERMS, UNIT>& x,
                               const float* scale,
                               VF<Set>& sum0,
                               VF<Set>& sum1) {
  const VI<Set> whole0 = dot<Set, kNibbles>(r0, x);
  const VI<Set> whole1 = dot<Set, kNibbles>(r1, x);
  sum0 += to_floats<Set::lanes>(whole0) * spread_scale<Set, SPLIT>(scale);
  sum1 += to_floats<Set::lanes>(whole1) * spread_scale<Set, SPLIT>(scale + 8);
}

// Read line i of UNIT tiles.
template <class Set, int BITS, int UNIT>
AUTO_GPTQ_INLINE void read_lines(const Place& at,
                                 int i,
                                 VW<Set> (&r0)[UNIT * kParts<Set>],
                                 VW<Set> (&r1)[UNIT * kParts<Set>]) {
  constexpr int P = kParts<Set>;
#pragma GCC unroll 2
  for (int t = 0; t < UNIT; ++t) {
    const uint32_t* from = at.rows + t * 128 * BITS;
    if (i % 2) {
      __builtin_prefetch(from + i * 8 + kFetched / 4, 0, 2);
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      read_line<Set, BITS>(from, at.high + t * 128 * BITS, i, p, r0[t * P + p], r1[t * P + p]);
    }
  }
}

// The same as add_line for 8 bits: words have two codes of each output, and x zeros in between.
template <class Set, bool SPLIT>
AUTO_GPTQ_INLINE void add_line_of_bytes(
    const Place& at, int i, const float* scale, VF<Set>& sum0, VF<Set>& sum1) {
  constexpr int P = kParts<Set>, kXBytes = bytes_of_x(8, true);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const uint32_t* line = at.rows + half * 128 + i * 16;
    __builtin_prefetch(line + kFetched / 4, 0, 2);
    VW<Set> codes[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      codes[p] = load<VW<Set>>(line + p * Set::lanes);
    }
    const auto x0 = read_x<Set, 2, 1, kXBytes>(at.x + half * 128, nullptr);
    const auto x1 = read_x<Set, 2, 1, kXBytes>(at.x + half * 128 + 64, nullptr);
    const float* own = scale + (SPLIT ? half * kSide : 0);
    sum0 += to_floats<Set::lanes>(dot<Set, kSparse>(codes, x0)) * own[0];
    sum1 += to_floats<Set::lanes>(dot<Set, kSparse>(codes, x1)) * own[8];
  }
}

// Add `units` times UNIT tiles times one row of x, whose sums stay in registers.
template <class Set, int BITS, bool SPLIT, int TERMS, int UNIT>
AUTO_GPTQ_INLINE void add_units(Place at, int first, int64_t units, Sums<Set, 1>& own) {
  VF<Set> sum[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i] = own.lanes[first + i][0];
  }
  for (int64_t u = 0; u < units; ++u) {
    const float* scale = own.scales[u][0][0] + first;
    if constexpr (BITS == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        add_line_of_bytes<Set, SPLIT>(at, i, scale + i, sum[i], sum[i + 8]);
      }
    } else {
      const auto x = read_x<Set, TERMS, UNIT, bytes_of_x(BITS, true)>(at.x, at.shifts);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        VW<Set> r0[UNIT * kParts<Set>], r1[UNIT * kParts<Set>];
        read_lines<Set, BITS, UNIT>(at, i, r0, r1);
        add_line<Set, BITS, SPLIT>(r0, r1, x, scale + i, sum[i], sum[i + 8]);
      }
    }
    at.advance<BITS, TERMS, UNIT>();
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    own.lanes[first + i][0] = sum[i];
  }
}

// The same for several rows of x: a line at a time, which its rows share.
template <class Set, int BITS, bool SPLIT, int TERMS, int UNIT, int M>
AUTO_GPTQ_INLINE void add_units_of_line(Place at,
                                        int first,
                                        int i,
                                        int64_t units,
                                        int64_t tiles,  // of a row of x
                                        Sums<Set, M>& own) {
  VF<Set> sum[2][M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    sum[0][m] = own.lanes[first + i][m];
    sum[1][m] = own.lanes[first + i + 8][m];
  }
  for (int64_t u = 0; u < units; ++u) {
    VW<Set> r0[UNIT * kParts<Set>], r1[UNIT * kParts<Set>];
    if constexpr (BITS != 8) {
      read_lines<Set, BITS, UNIT>(at, i, r0, r1);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* scale = own.scales[u][m][0] + first + i;
      const int8_t* from = at.x + m * tiles * TERMS * bytes_of_x(BITS, true);
      if constexpr (BITS == 8) {
        const Place own_place = {at.rows, at.high, from, nullptr};
        add_line_of_bytes<Set, SPLIT>(own_place, i, scale, sum[0][m], sum[1][m]);
      } else {
        const auto x = read_x<Set, TERMS, UNIT, bytes_of_x(BITS, true)>(
            from, at.shifts + m * tiles * kShifts);
        add_line<Set, BITS, SPLIT>(r0, r1, x, scale, sum[0][m], sum[1][m]);
      }
    }
    at.advance<BITS, TERMS, UNIT>();
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    own.lanes[first + i][m] = sum[0][m];
    own.lanes[first + i + 8][m] = sum[1][m];
  }
}

// Scales, and zero points, of the outputs that lie from `at` on.
template <class Set>
AUTO_GPTQ_INLINE VF<Set> read_scale(const Tiled& w, int64_t at) {
  typedef typename VectorOf<uint16_t, Set::lanes>::type Short;
  if (w.scale_type == kFloat32) {
    return load<VF<Set>>(static_cast<const float*>(w.scales) + at);
  }
  return widen_scales<Set>(w.scale_type, load<Short>(static_cast<const uint16_t*>(w.scales) + at));
}

template <class Set>
AUTO_GPTQ_INLINE VF<Set> read_zero(const Tiled& w, int64_t at) {
  if (w.zeros == nullptr) {
    return static_cast<float>(1 << (w.bits - 1)) - VF<Set>{};
  }
  return to_floats<Set::lanes>(Set::widen_bytes(w.zeros + at));
}

// Read the scales of outputs [n, stop) for tiles [begin, end), UNIT at a time, and take the zero
// points into account.
template <class Set, bool SPLIT, int UNIT, int M>
AUTO_GPTQ_INLINE void read_scales(const Tiled& w,
                                  const Rounded& x,
                                  int64_t m,
                                  int64_t n,
                                  int64_t stop,
                                  int64_t begin,
                                  int64_t end,
                                  Sums<Set, M>& own) {
  const int64_t tiles = tiles_of(w.k), width = kSide * tiles_of(w.n);
  int64_t group = group_at(w, begin * kSide), next = (group + 1) * w.group_size;
  for (int64_t t = begin, u = 0; t < end; t += UNIT, ++u) {
#pragma GCC unroll 2
    for (int half = 0; half < (SPLIT ? 2 : 1); ++half) {
      if (t * kSide + half * (kSide / 2) >= next && group + 1 < w.groups) {
        ++group;
        next += w.group_size;
      }
      float x_sum[M];
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
        const float* halves = x.sums + ((m + r) * tiles + t) * 2;
        x_sum[r] = halves[half];
        for (int i = 1; !SPLIT && i < 2 * UNIT; ++i) {
          x_sum[r] += halves[i];
        }
      }
      for (int64_t i = 0; i < stop - n; i += Set::lanes) {
        const VF<Set> scale = read_scale<Set>(w, group * width + n + i);
        const VF<Set> taken = scale * read_zero<Set>(w, group * width + n + i);
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
          own.zeros[i / Set::lanes][r] += taken * x_sum[r];
          store(own.scales[u][r][half] + i, scale * x.scales[((m + r) * tiles + t) * 2]);
        }
      }
    }
  }
}

// Add M rows of x from m on times outputs [n, stop) of one row of tiles, the tiles [begin, end) of
// the inputs.
template <class Set, int BITS, bool SPLIT, int TERMS, int UNIT, int M>
void add_span(const Tiled& w,
              const Rounded& x,
              int64_t m,
              int64_t n,
              int64_t stop,
              int64_t begin,
              int64_t end,
              Sums<Set, M>& own) {
  constexpr int64_t kXBytes = TERMS * bytes_of_x(BITS, true);
  const int64_t tiles = tiles_of(w.k), units = (end - begin) / UNIT;
  const uint32_t* tile = w.tiles + (n / kSide * tiles + begin) * 128 * BITS;
  read_scales<Set, SPLIT, UNIT, M>(w, x, m, n, stop, begin, end, own);
  for (int64_t row = n; row < stop; row += kRows) {
    const int row_tile = static_cast<int>(row % kSide / kRows), first = static_cast<int>(row - n);
    const Place at = {tile + row_tile * (BITS == 3 ? 64 : 32 * BITS), tile + 256 + row_tile * 32,
                      x.codes + (m * tiles + begin) * kXBytes,
                      TERMS == 1 ? x.shifts + (m * tiles + begin) * kShifts : nullptr};
    if constexpr (M == 1) {
      add_units<Set, BITS, SPLIT, TERMS, UNIT>(at, first, units, own);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < 8; ++i) {
        add_units_of_line<Set, BITS, SPLIT, TERMS, UNIT, M>(at, first, i, units, tiles, own);
      }
    }
  }
}

// Add up the lanes of each output, less what zero points take away, to one row of y.
template <class Set, int BITS, int M>
AUTO_GPTQ_INLINE void add_sums(const Sums<Set, M>& own, int m, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kRows) {
    VF<Set> lanes[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      lanes[r] = own.lanes[i + r][m];
    }
    alignas(64) float sums[kRows];
    Set::add_lanes(lanes, sums);
#pragma GCC unroll 2
    for (int p = 0; p < kParts<Set>; ++p) {
      const VF<Set> added = load<VF<Set>>(sums + p * Set::lanes);
      float* to = y + i + p * Set::lanes;
      store(to, load<VF<Set>>(to) + added - own.zeros[i / Set::lanes + p][m]);
    }
  }
}

// y += M rows of x from m on times outputs [n, stop), of one row of tiles.  Spans of inputs go
// through all outputs, so that memory is read nearly in order.
template <class Set, int BITS, int TERMS, int M>
void multiply_few(const Tiled& w, const Rounded& x, int64_t m, int64_t n, int64_t stop, float* y) {
  constexpr int kUnit = BITS == 8 ? 1 : 2;
  const int64_t tiles = tiles_of(w.k);
  Sums<Set, M> sums;
  std::memset(sums.lanes, 0, sizeof(sums.lanes));
  std::memset(sums.zeros, 0, sizeof(sums.zeros));
  constexpr int64_t kStep = BITS == 8 ? kTiles / 2 : kTiles;  // lines of 8 bits would meet in the cache
  for (int64_t t = 0; t < tiles; t += kStep) {
    const int64_t end = std::min(t + kStep, tiles);
    if (w.run < kSide) {
      add_span<Set, BITS, true, TERMS, 1, M>(w, x, m, n, stop, t, end, sums);
      continue;
    }
    const int64_t whole = x.unit > 1 && kUnit > 1 ? end - (end - t) % kUnit : t;
    if constexpr (kUnit > 1) {
      add_span<Set, BITS, false, TERMS, kUnit, M>(w, x, m, n, stop, t, whole, sums);
    }
    if (whole < end) {
      add_span<Set, BITS, false, TERMS, 1, M>(w, x, m, n, stop, whole, end, sums);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) {
    add_sums<Set, BITS, M>(sums, r, stop - n, y + r * w.n + n);
  }
}

// The same for all rows of x.
template <class Set, int BITS, int TERMS>
void multiply_few_rows(const Tiled& w, const Rounded& x, int64_t n, int64_t stop, float* y) {
  by_rows<4>(x.m, [&](auto rows, int64_t m) {
    multiply_few<Set, BITS, TERMS, rows>(w, x, m, n, stop, y + m * w.n);
  });
}

}  // namespace
}  // namespace auto_gptq
