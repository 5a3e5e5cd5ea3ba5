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

  template <Kind KIND, int N>
  static AUTO_GPTQ_INLINE Ints<8> dot(const Words<8> (&codes)[N], const Words<8> (&x)[N]) {
    static_assert(N <= 8);
    Ints<8> sum{};
    __m256i sums{};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if constexpr (KIND == kNibbles) {
        sums = _mm256_add_epi16(sums, pairs(codes[i], x[i]));
      } else {
        sum += widen(pairs(codes[i], x[i]), 1);
      }
    }
    return KIND == kNibbles ? widen(sums, 1) : sum;
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

  static AUTO_GPTQ_INLINE Floats<8> repeat(const float* from) {
    return (Floats<8>)_mm256_broadcast_ps((const __m128*)from);
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
