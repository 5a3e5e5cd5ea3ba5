// Products with tiles for AVX2: pairs of products of bytes are summed in 16 bits.
#include <immintrin.h>

#include <algorithm>

#include "tiles_order.h"

#ifdef __x86_64__
#pragma GCC target("avx2,fma,f16c")
#include "tiles.h"

namespace auto_gptq {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  static constexpr bool takes_bytes = false;
  static constexpr int rows_at_once = 4;

  // 16 pairs of products in 16 bits: 2 * 15 * 127 each, or 255 * 127.
  static AUTO_GPTQ_INLINE __m256i pairs(Words<8> codes, Words<8> x) {
    return _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
  }

  static AUTO_GPTQ_INLINE Ints<8> widen(__m256i sums, int factor) {
    return (Ints<8>)_mm256_madd_epi16(sums, _mm256_set1_epi16(factor));
  }

  // Of up to four vectors: 2 * 4 * 15 * 127 at most.
  template <Kind KIND, int N>
  static AUTO_GPTQ_INLINE Ints<8> dot(const Words<8> (&codes)[N],
                                      const Words<8> (&x)[N],
                                      int factor = 1) {
    static_assert(KIND == kNibbles || KIND == kSparse);
    Ints<8> sum{};
    __m256i sums{};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if constexpr (KIND == kNibbles) {
        sums = i ? _mm256_add_epi16(sums, pairs(codes[i], x[i])) : pairs(codes[i], x[i]);
      } else {
        sum += widen(pairs(codes[i], x[i]), factor);
      }
    }
    return KIND == kNibbles ? widen(sums, factor) : sum;
  }

  template <Kind KIND, int N>
  static AUTO_GPTQ_INLINE Ints<8> dot(const Words<8> (&codes)[N],
                                      const Words<8> (&high)[N],
                                      const Words<8> (&low)[N]) {
    return dot<KIND>(codes, high, 128) + dot<KIND>(codes, low);
  }

  template <Kind KIND>
  static AUTO_GPTQ_INLINE Ints<8> dot_all(const Words<8> (&codes)[8], const int8_t* x) {
    __m256i low{}, high{};  // 8 * 2 * 15 * 127 at most
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Words<8> word = Words<8>{} + load<uint32_t>(x + 4 * i);
      if constexpr (KIND == kNibbles) {
        low = _mm256_add_epi16(low, pairs(codes[i], word));
      } else {
        low = _mm256_add_epi16(low, pairs(codes[i] & 0x0f0f0f0f, word));
        high = _mm256_add_epi16(high, pairs(codes[i] >> 4 & 0x0f0f0f0f, word));
      }
    }
    return KIND == kNibbles ? widen(low, 1) : widen(low, 1) + widen(high, 16);
  }

  // Add in this order: compilers would add up in pairs, for which there are too few registers.
  static AUTO_GPTQ_INLINE void add(__m256i& sum, __m256i more) {
    sum = _mm256_add_epi16(sum, more);
    __asm__("" : "+x"(sum));
  }

  // In 16 bits: 8 * 2 * 15 * 127 at most.
  template <int TERMS, int M, int C, class Products>
  static AUTO_GPTQ_INLINE void multiply_eight(const uint32_t* codes,
                                              const int8_t* x,
                                              int64_t x_stride,
                                              Products (&own)[C]) {
    __m256i low[C][M][TERMS] = {}, high[C][M][TERMS] = {};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const uint32_t* from = codes + i * kWord + c * kColumn<Avx2>;
        __builtin_prefetch(from + kAhead / 4, 0, 2);
        const Words<8> bytes = load<Words<8>>(from);
#pragma GCC unroll 2
        for (int r = 0; r < M; ++r) {
#pragma GCC unroll 2
          for (int t = 0; t < TERMS; ++t) {
            const int8_t* four = x + r * x_stride + t * kSide + 4 * i;
            const Words<8> word = Words<8>{} + load<uint32_t>(four);
            add(low[c][r][t], pairs(bytes & 0x0f0f0f0f, word));
            add(high[c][r][t], pairs(bytes >> 4 & 0x0f0f0f0f, word));
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int r = 0; r < M; ++r) {
#pragma GCC unroll 2
        for (int t = 0; t < TERMS; ++t) {
          own[c].low[r][t] += widen(low[c][r][t], 1);
          own[c].other[r][t] += widen(high[c][r][t], 1);
        }
      }
    }
  }

  static AUTO_GPTQ_INLINE Words<8> keep(Words<8> x) { return x; }

  static AUTO_GPTQ_INLINE Ints<8> repeat_shifts(const int32_t* shifts) {
    return load<Ints<8>>(shifts);
  }

  static AUTO_GPTQ_INLINE Words<8> repeat_eight(const uint32_t* words, int p) {
    return load<Words<8>>(words) >> p * 4;
  }

  static AUTO_GPTQ_INLINE Words<8> double_four(const uint32_t* words) {
    const __m256i four = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)words));
    const Words<8> order = {0, 0, 1, 1, 2, 2, 3, 3};
    return (Words<8>)_mm256_permutevar8x32_epi32(four, (__m256i)order);
  }

  // Sums over 128 bits of four vectors, in every 128 bits.
  static AUTO_GPTQ_INLINE __m256 add_four(const Floats<8>* v) {
    return _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]),
                          _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  }

  static AUTO_GPTQ_INLINE void add_lanes(const Floats<8> (&v)[16], float* sums) {
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += 8) {
      const __m256 a = add_four(v + i), b = add_four(v + i + 4);
      store(sums + i, _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
    }
  }

  static AUTO_GPTQ_INLINE Floats<8> widen_halves(Halves halves) { return widen_half(halves); }

  static AUTO_GPTQ_INLINE Ints<8> widen_bytes(const uint8_t* bytes) {
    return (Ints<8>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
  }

  static AUTO_GPTQ_INLINE Floats<8> widen_half(Halves halves) {
    return (Floats<8>)_mm256_cvtph_ps((__m128i)halves);
  }
};

}  // namespace

void multiply_tiles_avx2(
    const Tiled& weight, const Rounded& x, float* y, int64_t n_begin, int64_t n_end) {
  multiply_tiles<Avx2>(weight, x, y, n_begin, n_end);
}

}  // namespace auto_gptq
#endif
