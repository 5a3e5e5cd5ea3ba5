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

  template <Kind KIND>
  static AUTO_GPTQ_INLINE Ints<16> dot_all(const Words<16> (&codes)[8], const int8_t* x) {
    Ints<16> sum{};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      sum = add(sum, codes[i], Words<16>{} + load<uint32_t>(x + 4 * i));
    }
    return sum;
  }

  static AUTO_GPTQ_INLINE Floats<16> repeat(const float* from) {
    return (Floats<16>)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from));
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
