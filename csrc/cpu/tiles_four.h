// x W^T for 4-bit tiles, whose words the CPU holds such that lanes are outputs.
//
// A byte of a word has two codes of one input: r0's in its low half, r1's in its high half.  A
// column is what a vector of words has in it, twice as many outputs as lanes.  Sums stay in whole
// numbers while inputs share their scales; nothing is added up across lanes.  A range of outputs is
// multiples of 32.
#pragma once

#include "tiles_set.h"

namespace auto_gptq {
namespace {

constexpr int kWord = 16;          // words from one that an output has to its next
constexpr int kEight = 8 * kWord;  // eight of 16 outputs each, 32 inputs: a half of the steps
constexpr int64_t kAhead = 8192;   // bytes that are fetched ahead: tiles lie in the order of use
constexpr int64_t kSpan = 16;      // eights of inputs that all columns of a tile take at once
template <class Set>
constexpr int kColumn = Set::lanes == 16 ? 2 * kEight : 8;  // words from one column to the next

// Sums side by side of one row of x: of its terms, or, of one term, of every other word, as a sum
// waits for the one before.
template <int TERMS, int M>
constexpr int kSums = M == 1 ? 2 : TERMS;

// Of M rows of x: products with the low halves of bytes, and with whole bytes where
// Set::takes_bytes, with the high halves where it does not.
template <class Set, int TERMS, int M>
struct Products {
  VI<Set> low[M][kSums<TERMS, M>], other[M][kSums<TERMS, M>];
};

template <class Set, int TERMS, int N>
AUTO_GPTQ_INLINE VI<Set> join(const VI<Set> (&sums)[N]) {
  if constexpr (N == 1) {
    return sums[0];
  } else {
    return (TERMS == 2 ? sums[0] << 7 : sums[0]) + sums[1];
  }
}

// Numbers of the outputs of a column, HALF 0 for r0 and 1 for r1; 16 lanes have two row tiles.
template <class Set, typename T>
AUTO_GPTQ_INLINE typename VectorOf<T, Set::lanes>::type take(const T* from, int half) {
  typedef typename VectorOf<T, 8>::type Eight;
  const Eight first = load<Eight>(from + 8 * half);
  if constexpr (Set::lanes == 8) {
    return first;
  } else {
    const Eight second = load<Eight>(from + kRows + 8 * half);
    return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                   15);
  }
}

template <class Set>
AUTO_GPTQ_INLINE void add_to(float* y, int half, VF<Set> sum) {
  if constexpr (Set::lanes == 8) {
    store(y + 8 * half, load<VF<Set>>(y + 8 * half) + sum);
  } else {
    float* second = y + kRows;
    const auto low = __builtin_shufflevector(sum, sum, 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15);
    store(y + 8 * half, load<Floats<8>>(y + 8 * half) + low);
    store(second + 8 * half, load<Floats<8>>(second + 8 * half) + high);
  }
}

template <class Set>
AUTO_GPTQ_INLINE VF<Set> scales_of(const Tiled& w, int64_t at, int half) {
  if (w.scale_type == kFloat32) {
    return take<Set>(static_cast<const float*>(w.scales) + at, half);
  }
  const auto halves = take<Set>(static_cast<const uint16_t*>(w.scales) + at, half);
  return widen_scales<Set>(w.scale_type, halves);
}

template <class Set>
AUTO_GPTQ_INLINE VF<Set> zeros_of(const Tiled& w, int64_t at, int half) {
  if (w.zeros == nullptr) {
    return 8.0f - VF<Set>{};
  }
  return __builtin_convertvector(take<Set>(w.zeros + at, half), VF<Set>);
}

// Add M rows of x from m on times C columns from output n on, the eights [begin, end) of the inputs.
template <class Set, int TERMS, int M, int C>
AUTO_GPTQ_INLINE void add_columns(const Tiled& w,
                                  const Rounded& x,
                                  int64_t m,
                                  int64_t n,
                                  int64_t begin,
                                  int64_t end,
                                  float* y) {
  constexpr int kOutputs = 2 * Set::lanes, kX = TERMS * kSide;
  const int64_t tiles = tiles_of(w.k), width = kSide * tiles_of(w.n);
  const int64_t shared = w.run < kSide ? 1 : 2 * x.unit;  // eights with the same scales
  const int column = static_cast<int>(n % kSide / kOutputs) * Set::lanes;  // in words of a pair
  const uint32_t* codes = w.tiles + n / kSide * tiles * 4 * kEight + column / kWord * 2 * kEight +
                          column % kWord;
  VF<Set> sums[C][M][2] = {};
  for (int64_t at = begin; at < end; at += shared) {
    const int64_t stop = std::min(at + shared, end);
    const int64_t group = group_at(w, at * kRounded), grid = group * width + n;
    VF<Set> values[C][M][2] = {};
    float x_sum[M] = {};
    for (int64_t e = at; e < stop;) {
      const int64_t first = e, last = TERMS == 1 ? e + 1 : stop;  // with the same scale of x
      Products<Set, TERMS, M> own[C] = {};
      for (; e < last; ++e) {
        const int8_t* from = x.codes + (m * tiles + e / 2) * kX + e % 2 * kRounded;
        const uint32_t* words = codes + e / 2 * 4 * kEight + e % 2 * kEight;
        Set::template multiply_eight<TERMS, M, C>(words, from, tiles * kX, own);
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
          x_sum[r] += x.sums[(m + r) * tiles * 2 + e];
        }
      }
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
          const VI<Set> low = join<Set, TERMS>(own[c].low[r]);
          VI<Set> high = join<Set, TERMS>(own[c].other[r]);
          if constexpr (Set::takes_bytes) {
            high -= low;
          }
          const float scale = x.scales[(m + r) * tiles * 2 + first];
          values[c][r][0] += __builtin_convertvector(low, VF<Set>) * scale;
          values[c][r][1] +=
              __builtin_convertvector(high, VF<Set>) * (Set::takes_bytes ? scale / 16 : scale);
        }
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const VF<Set> scale = scales_of<Set>(w, grid + c * kOutputs, half);
        const VF<Set> zero = zeros_of<Set>(w, grid + c * kOutputs, half);
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
          sums[c][r][half] += scale * (values[c][r][half] - zero * x_sum[r]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      float* to = y + (m + r) * w.n + n + c * kOutputs;
      add_to<Set>(to, 0, sums[c][r][0]);
      add_to<Set>(to, 1, sums[c][r][1]);
    }
  }
}

// y += M rows of x from m on times outputs [n, stop) of one row of tiles.  Spans of inputs go through
// all columns, so that memory is read in order.
template <class Set, int TERMS, int M>
void multiply_span(const Tiled& w, const Rounded& x, int64_t m, int64_t n, int64_t stop, float* y) {
  constexpr int64_t kOutputs = 2 * Set::lanes;
  const int64_t eights = 2 * tiles_of(w.k);
  for (int64_t begin = 0; begin < eights; begin += kSpan) {
    const int64_t end = std::min(begin + kSpan, eights);
    int64_t at = n;
    for (; M == 1 && at + 2 * kOutputs <= stop; at += 2 * kOutputs) {
      add_columns<Set, TERMS, M, 2>(w, x, m, at, begin, end, y);
    }
    for (; at < stop; at += kOutputs) {
      add_columns<Set, TERMS, M, 1>(w, x, m, at, begin, end, y);
    }
  }
}

// The same for all rows of x.
template <class Set, int TERMS>
void multiply_four(const Tiled& w, const Rounded& x, int64_t n, int64_t stop, float* y) {
  constexpr int kMost = Set::lanes == 16 ? 4 : 2;  // AVX2 has half as many registers
  by_rows<kMost>(x.m, [&](auto rows, int64_t m) {
    multiply_span<Set, TERMS, rows>(w, x, m, n, stop, y);
  });
}

}  // namespace
}  // namespace auto_gptq
