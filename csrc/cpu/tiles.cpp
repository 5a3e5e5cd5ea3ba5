// Rounding of x for products with tiles, and the choice among the instruction sets.
#include <algorithm>

#include "tiles_unfold.h"

namespace auto_gptq {

void multiply_tiles_avx2(const Tiled&, const Rounded&, float*, int64_t, int64_t);
void multiply_tiles_avx512(const Tiled&, const Rounded&, float*, int64_t, int64_t);

namespace {

struct Portable {
  static Floats<8> widen_half(Halves halves) { return widen_float16(halves); }
};

// For processors without AVX2: x comes in the order for many rows, and the compiler does the rest.
void multiply_portable(const Tiled& w, const Rounded& x, float* y, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(w.k);
  uint32_t words[16][kRows];
  for (int64_t n = begin; n < end; n += kRows) {
    for (int64_t t = 0; t < tiles; ++t) {
      unfold(w, n, t, words[0]);
      for (int half = 0; half < 2; ++half) {
        const int64_t group = group_at(w, t * kSide + half * kRounded);
        Grid grid;
        read_grid<Portable>(w, group, n, grid);
        for (int64_t m = 0; m < x.m; ++m) {
          const int64_t at = m * tiles + t;
          const int8_t* from = x.codes + at * x.terms * kSide + half * kRounded;
          int32_t sum[kRows] = {};
          for (int i = 0; i < kRounded; ++i) {
            const int32_t own =
                x.terms == 1 ? from[i] : from[i] * 128 + from[kSide + i];
            for (int r = 0; r < kRows; ++r) {
              sum[r] += static_cast<int32_t>(words[half * 8 + i / 4][r] >> i % 4 * 8 & 0xff) * own;
            }
          }
          const float x_scale = x.scales[at * 2 + half], x_sum = x.sums[at * 2 + half];
          for (int r = 0; r < kRows; ++r) {
            y[m * w.n + n + r] +=
                grid.scale[r] * (static_cast<float>(sum[r]) * x_scale - grid.zero[r] * x_sum);
          }
        }
      }
    }
  }
}

constexpr Order kOrders[2][4] = {
    {order_of(2, false), order_of(3, false), order_of(4, false), order_of(8, false)},
    {order_of(2, true), order_of(3, true), order_of(4, true), order_of(8, true)},
};

// Numbers in the order of steps, of up to two tiles, and one place for nothing.
struct Numbers {
  alignas(64) float x[2 * kSide];
  int8_t high[2 * kSide], low[2 * kSide];
};

// Round x[begin .. begin + count).
AUTO_GPTQ_INLINE float round_block(Numbers& own, int begin, int count, int terms) {
  const int end = begin + count;
  uint32_t largest = 0;  // as bits, for which NaN is larger than infinity
  for (int i = begin; i < end; ++i) {
    largest = std::max(largest, load<uint32_t>(own.x + i) & 0x7fffffff);
  }
  const float absolute = load<float>(&largest), most = terms == 1 ? kOneTerm : kTwoTerms;
  // What is not finite makes all of the output NaN.  Of the least numbers nothing is left.
  const bool finite = largest < 0x7f800000;
  const float inverse = finite && absolute > 1e-30f ? most / absolute : 0.0f;
  for (int i = begin; i < end; ++i) {
    const float shifted = (finite ? own.x[i] : 0.0f) * inverse + 12582912.0f;  // to nearest
    const int32_t whole = load<int32_t>(&shifted) - 0x4b400000;
    const int32_t upper = terms == 1 ? whole : (whole + 64) >> 7;
    own.high[i] = static_cast<int8_t>(upper);
    own.low[i] = static_cast<int8_t>(whole - upper * 128);
  }
  return finite ? absolute / most : __builtin_nanf("");
}

AUTO_GPTQ_INLINE float sum_block(const Numbers& own, int begin, int terms) {
  int32_t sum = 0;
  for (int i = begin; i < begin + kSide / 2; ++i) {
    sum += terms == 1 ? own.high[i] : own.high[i] * 128 + own.low[i];
  }
  return static_cast<float>(sum);
}

// Take the inputs of tile t of a row in the order of steps.
AUTO_GPTQ_INLINE void take_tile(const Tiled& w, const float* row, int64_t t, float* to) {
  const int64_t first = t * kSide;
  const bool plain = !w.perm && first + kSide <= w.k;
  for (int step = 0; step < 4; ++step) {
    for (int q = 0; q < 4; ++q) {
      float* four = to + step * 16 + q * 4;
      const int64_t place = first + place_of(w.run, step, q, 0);
      if (plain) {
        store(four, load<Floats<4>>(row + place));
        continue;
      }
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t at = place + i;
        four[i] = at < w.k ? row[w.perm ? w.perm[at] : at] : 0.0f;
      }
    }
  }
}

AUTO_GPTQ_INLINE void round_rows(
    const Tiled& w, const float* x, const Rounded& to, int64_t begin, int64_t end) {
  const Order& order = kOrders[to.few][w.bits == 8 ? 3 : w.bits - 2];
  const int bytes = bytes_of_x(w.bits, to.few);
  const int64_t tiles = tiles_of(w.k);
  Numbers own;
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t t = 0; t < tiles; t += to.unit) {
      const int count = static_cast<int>(std::min<int64_t>(to.unit, tiles - t)) * kSide;
      for (int i = 0; i < count; i += kSide) {
        take_tile(w, x + m * w.k, t + i / kSide, own.x + i);
      }
      const int block = to.terms == 1 ? kSide / 2 : count;
      for (int i = 0; i < count; i += block) {
        const float scale = round_block(own, i, block, to.terms);
        for (int half = i; half < i + block; half += kSide / 2) {
          const int64_t at = (m * tiles + t) * 2 + half / (kSide / 2);
          to.scales[at] = scale;
          to.sums[at] = sum_block(own, half, to.terms) * scale;
        }
      }
      for (int i = 0; i < count; i += kSide) {
        int8_t* codes = to.codes + (m * tiles + t + i / kSide) * to.terms * bytes;
        for (int j = 0; j < bytes; ++j) {
          const int input = order.input[j];
          codes[j] = input == kNothing ? 0 : own.high[i + input];
          if (to.terms == 2) {
            codes[bytes + j] = input == kNothing ? 0 : own.low[i + input];
          }
        }
      }
    }
  }
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void round_rows_avx2(const Tiled& weight,
                                                         const float* x,
                                                         const Rounded& to,
                                                         int64_t begin,
                                                         int64_t end) {
  round_rows(weight, x, to, begin, end);
}
#endif

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cpu_bytes_of_x(int32_t bits, int32_t few) { return bytes_of_x(bits, few); }

void auto_gptq_cpu_round(const Tiled* weight,
                         const float* x,
                         const Rounded* rounded,
                         int64_t begin,
                         int64_t end,
                         Isa isa) {
#ifdef __x86_64__
  if (isa >= kAvx2) return round_rows_avx2(*weight, x, *rounded, begin, end);
#endif
  round_rows(*weight, x, *rounded, begin, end);
}

void auto_gptq_cpu_multiply_tiles(
    const Tiled* weight, const Rounded* x, float* y, int64_t n_begin, int64_t n_end, Isa isa) {
#ifdef __x86_64__
  if (isa == kAvx512Vnni) return multiply_tiles_avx512(*weight, *x, y, n_begin, n_end);
  if (isa >= kAvx2) return multiply_tiles_avx2(*weight, *x, y, n_begin, n_end);
#endif
  multiply_portable(*weight, *x, y, n_begin, n_end);
}
