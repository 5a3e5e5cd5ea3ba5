// Rounding of x for products with tiles, and the choice among the instruction sets.
#include <algorithm>
#include <cmath>

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

// Numbers of up to two tiles, in the order of the bytes of x.
struct Numbers {
  alignas(64) float x[2 * kSide];
  alignas(64) int32_t whole[2 * kSide];  // rounded, before scaling
  int8_t high[2 * kSide], low[2 * kSide];
};

// Where the bytes of x come from.
struct Source {
  const Order* order;
  int64_t place[kSide];  // in its tile of each number; of 4 * kSide bytes only those that are not 0
  alignas(64) int32_t second[kSide];  // -1 for each number of the second half of the steps, else 0
  int bytes;                          // of x per tile and term
  bool neighbours;                    // whether each word has inputs 0, 2, 1, 3 from its first on
};

AUTO_GPTQ_INLINE Source source_of(const Tiled& w, const Rounded& to) {
  const int bytes = bytes_of_x(w.bits, to.few);
  Source source{&kOrders[to.few][w.bits == 8 ? 3 : w.bits - 2], {}, {}, bytes, w.bits == 4};
  for (int j = 0; j < kSide; ++j) {
    const int input = bytes == kSide ? source.order->input[j] : j;
    source.place[j] = place_of(w.run, input / 16, input % 16 / 4, input % 4);
    source.second[j] = input >= kSide / 2 ? -1 : 0;
  }
  return source;
}

// What is not finite makes all of the output NaN.  Of the least numbers nothing is left.
struct Size {
  float largest;  // NaN if a number is not finite
  float inverse;  // 0 if nothing is left

  // Of a block of numbers.
  static AUTO_GPTQ_INLINE Size of(const float* x, int count) {
    uint32_t largest = 0;  // as bits, for which NaN is larger than infinity
    for (int i = 0; i < count; ++i) {
      largest = std::max(largest, load<uint32_t>(x + i) & 0x7fffffff);
    }
    const float absolute = load<float>(&largest);
    const bool finite = largest < 0x7f800000;
    return {finite ? absolute : __builtin_nanf(""),
            finite && absolute > 1e-30f ? 1.0f / absolute : 0.0f};
  }
};

AUTO_GPTQ_INLINE int32_t to_nearest(float x) {
  const float shifted = x + 12582912.0f;
  return load<int32_t>(&shifted) - 0x4b400000;
}

// Round x[begin .. begin + count), and give the scale.
AUTO_GPTQ_INLINE float round_block(Numbers& own, int begin, int count, int terms) {
  const float most = terms == 1 ? kOneTerm : kTwoTerms;
  const Size size = Size::of(own.x + begin, count);
  const float factor = size.inverse * most;
  for (int i = begin; i < begin + count; ++i) {
    const int32_t whole = to_nearest(factor == 0 ? 0.0f : own.x[i] * factor);
    const int32_t upper = terms == 1 ? whole : (whole + 64) >> 7;
    own.whole[i] = whole;
    own.high[i] = static_cast<int8_t>(upper);
    own.low[i] = static_cast<int8_t>(whole - upper * 128);
  }
  return size.largest / most;
}

// Round x[0 .. count) to bytes that are shifted by up to 7 bits, word by word, and give the scale.
AUTO_GPTQ_INLINE float round_shifted(Numbers& own, int count, int32_t* shifts) {
  const Size size = Size::of(own.x, count);
  float largest[4 * kShifts] = {}, factors[4 * kShifts];
  int32_t units[4 * kShifts];
  for (int i = 0; i < count; i += 4 * kShifts) {
    for (int j = 0; j < 4 * kShifts; ++j) {
      largest[j] = std::max(largest[j], std::abs(own.x[i + j]));
    }
  }
  for (int word = 0; word < kShifts; ++word) {
    const float* four = largest + 4 * word;
    const float most = std::max(std::max(four[0], four[1]), std::max(four[2], four[3]));
    const float share = most * size.inverse * 128.0f;  // the least power of two that is not below it
    const int32_t exponent = (load<int32_t>(&share) + 0x7fffff) >> 23;
    shifts[word] = std::min(std::max(exponent - 127, 0), 7);
    std::fill_n(factors + 4 * word, 4,
                size.inverse * static_cast<float>(kOneTerm << 7 >> shifts[word]));
    std::fill_n(units + 4 * word, 4, 1 << shifts[word]);
  }
  for (int i = 0; i < count; i += 4 * kShifts) {
    for (int j = 0; j < 4 * kShifts; ++j) {
      const float value = factors[j] == 0 ? 0.0f : own.x[i + j] * factors[j];
      own.whole[i + j] = to_nearest(value);
    }
    for (int j = i; j < i + 4 * kShifts; ++j) {
      own.high[j] = static_cast<int8_t>(own.whole[j]);
      own.whole[j] *= units[j - i];
    }
  }
  return size.largest / (kOneTerm << 7);
}

// Add up the numbers of each half of the tile that starts at `begin`.
AUTO_GPTQ_INLINE void sum_halves(const Numbers& own, int begin, const Source& source, float* sums) {
  int32_t all = 0, second = 0;
  for (int i = 0; i < kSide; ++i) {
    all += own.whole[begin + i];
    second += own.whole[begin + i] & source.second[i];
  }
  sums[0] = static_cast<float>(all - second);
  sums[1] = static_cast<float>(second);
}

// Take the inputs of tile t of a row in the order of x's bytes.
AUTO_GPTQ_INLINE void take_tile(
    const Tiled& w, const Source& source, const float* row, int64_t t, float* to) {
  const int64_t first = t * kSide;
  if (!w.perm && first + kSide <= w.k) {
    if (source.neighbours) {
      for (int j = 0; j < kSide; j += 4) {
        const Floats<4> four = load<Floats<4>>(row + first + source.place[j]);
        store(to + j, __builtin_shufflevector(four, four, 0, 2, 1, 3));
      }
      return;
    }
    for (int j = 0; j < kSide; ++j) {
      to[j] = row[first + source.place[j]];
    }
    return;
  }
  for (int j = 0; j < kSide; ++j) {
    const int64_t at = first + source.place[j];
    to[j] = at < w.k ? row[w.perm ? w.perm[at] : at] : 0.0f;
  }
}

AUTO_GPTQ_INLINE void put_codes(const Source& source, const int8_t* from, int8_t* to) {
  if (source.bytes == kSide) {
    std::memcpy(to, from, kSide);
    return;
  }
  for (int j = 0; j < source.bytes; ++j) {
    const int input = source.order->input[j];
    to[j] = input == kNothing ? 0 : from[input];
  }
}

AUTO_GPTQ_INLINE void round_rows(
    const Tiled& w, const float* x, const Rounded& to, int64_t begin, int64_t end) {
  const Source source = source_of(w, to);
  const int64_t tiles = tiles_of(w.k);
  const bool shifted = to.few && to.terms == 1;
  Numbers own;
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t t = 0; t < tiles; t += to.unit) {
      const int count = static_cast<int>(std::min<int64_t>(to.unit, tiles - t)) * kSide;
      for (int i = 0; i < count; i += kSide) {
        take_tile(w, source, x + m * w.k, t + i / kSide, own.x + i);
      }
      int32_t* shifts = shifted ? to.shifts + (m * tiles + t) * kShifts : nullptr;
      float* scales = to.scales + (m * tiles + t) * 2;
      const int block = to.terms == 1 && !shifted ? kSide / 2 : count;
      for (int i = 0; i < count; i += block) {
        const float scale =
            shifted ? round_shifted(own, count, shifts) : round_block(own, i, block, to.terms);
        std::fill_n(scales + i / (kSide / 2), block / (kSide / 2), scale);
      }
      for (int i = 0; i < count; i += kSide) {
        const int64_t at = m * tiles + t + i / kSide;
        float sums[2];
        sum_halves(own, i, source, sums);
        to.sums[at * 2] = sums[0] * to.scales[at * 2];
        to.sums[at * 2 + 1] = sums[1] * to.scales[at * 2 + 1];
        int8_t* codes = to.codes + at * to.terms * source.bytes;
        put_codes(source, own.high + i, codes);
        if (to.terms == 2) {
          put_codes(source, own.low + i, codes + source.bytes);
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
