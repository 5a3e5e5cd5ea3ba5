// Products with tiles for AVX-512 with VNNI, which sums four products of bytes in 32 bits.
#include <immintrin.h>

#include <algorithm>

#include "tiles_order.h"

#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "tiles.h"

namespace auto_gptq {
namespace {

struct Avx512Vnni {
  static constexpr int lanes = 16;
  static constexpr bool takes_bytes = true;
  static constexpr int rows_at_once = 8;

  static AUTO_GPTQ_INLINE Ints<16> add(Ints<16> sum, Words<16> codes, Words<16> x) {
    return (Ints<16>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
  }

  template <Kind KIND, int N>
  static AUTO_GPTQ_INLINE Ints<16> dot(const Words<16> (&codes)[N], const Words<16> (&x)[N]) {
    Ints<16> sum{};
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      sum = add(sum, codes[i], x[i]);
    }
    return sum;
  }

  template <Kind KIND, int N>
  static AUTO_GPTQ_INLINE Ints<16> dot(const Words<16> (&codes)[N],
                                       const Words<16> (&high)[N],
                                       const Words<16> (&low)[N]) {
    Ints<16> sum = dot<KIND>(codes, high) << 7;
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      sum = add(sum, codes[i], low[i]);
    }
    return sum;
  }

  template <Kind KIND>
  static AUTO_GPTQ_INLINE Ints<16> dot_all(const Words<16> (&codes)[8], const int8_t* x) {
    Ints<16> sum{};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      sum = add(sum, codes[i], Words<16>{} + load<uint32_t>(x + 4 * i));
    }
    return sum;
  }

  template <int TERMS, int M, int C, class Products>
  static AUTO_GPTQ_INLINE void multiply_eight(const uint32_t* codes,
                                              const int8_t* x,
                                              int64_t x_stride,
                                              Products (&own)[C]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const uint32_t* from = codes + i * kWord + c * kColumn<Avx512Vnni>;
        __builtin_prefetch(from + kAhead / 4, 0, 2);
        const Words<16> bytes = keep(load<Words<16>>(from)), low = bytes & 0x0f0f0f0f;
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
#pragma GCC unroll 2
          for (int t = 0; t < TERMS; ++t) {
            const int8_t* four = x + r * x_stride + t * kSide + 4 * i;
            const Words<16> word = Words<16>{} + load<uint32_t>(four);
            const int sum = TERMS == 1 ? i % kSums<TERMS, M> : t;
            own[c].low[r][sum] = add(own[c].low[r][sum], low, word);
            own[c].other[r][sum] = add(own[c].other[r][sum], bytes, word);
          }
        }
      }
    }
  }

  static AUTO_GPTQ_INLINE Words<16> keep(Words<16> x) {
    __asm__("" : "+v"(x));
    return x;
  }

  static AUTO_GPTQ_INLINE Ints<16> repeat_shifts(const int32_t* shifts) {
    return (Ints<16>)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)shifts));
  }

  static AUTO_GPTQ_INLINE Words<16> repeat_eight(const uint32_t* words, int) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)words));
    return (Words<16>)twice >> Words<16>{0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
  }

  static AUTO_GPTQ_INLINE Words<16> double_four(const uint32_t* words) {
    const __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)words));
    const Words<16> order = {0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3};
    return (Words<16>)_mm512_permutexvar_epi32((__m512i)order, four);
  }

  // Sums over 128 bits of four vectors, in every 128 bits.
  static AUTO_GPTQ_INLINE __m512 add_four(const Floats<16>* v) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    return (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
  }

  static AUTO_GPTQ_INLINE __m512 add_parts(__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }

  static AUTO_GPTQ_INLINE void add_lanes(const Floats<16> (&v)[16], float* sums) {
    const __m512 first = add_parts(add_four(v), add_four(v + 4));
    const __m512 second = add_parts(add_four(v + 8), add_four(v + 12));
    store(sums, add_parts(first, second));
  }

  static AUTO_GPTQ_INLINE Floats<16> widen_halves(VectorOf<uint16_t, 16>::type halves) {
    return (Floats<16>)_mm512_cvtph_ps((__m256i)halves);
  }

  static AUTO_GPTQ_INLINE Ints<16> widen_bytes(const uint8_t* bytes) {
    return (Ints<16>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
  }

  static AUTO_GPTQ_INLINE Floats<8> widen_half(Halves halves) {
    return (Floats<8>)_mm256_cvtph_ps((__m128i)halves);
  }
};

}  // namespace

void multiply_tiles_avx512(
    const Tiled& weight, const Rounded& x, float* y, int64_t n_begin, int64_t n_end) {
  multiply_tiles<Avx512Vnni>(weight, x, y, n_begin, n_end);
}

}  // namespace auto_gptq
#endif
