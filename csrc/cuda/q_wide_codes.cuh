// Codes of a stage as operands of its products.
#pragma once

#include "tiles.cuh"
#include "warpgroup.cuh"

namespace auto_gptq::wide {

// Whether the kernel brings codes into the order of x; if not, x is arranged (arrange.h).
__host__ __device__ constexpr bool takes_own_order(int bits, int spans) {
  return bits == 4 && spans <= 2;
}

// The grids of a stage in shared memory: of each span of its inputs, which share a group.
template <int COLUMNS, int SPANS>
struct Grids {
  static constexpr int kSpan = COLUMNS * 4;  // scales have up to 4 bytes
  static constexpr int kZeros = SPANS * kSpan;
  static constexpr int kBytes = kZeros + SPANS * COLUMNS;
};

// What a lane needs of a stage: codes of 2 outputs, eight apart, and 16 inputs, and their grids.
// PLAIN: symmetric, with scales of type T.
//
// It gets ready in steps, so that other work fills the time that words take from lane to lane.
template <int BITS, typename T, int SPANS, bool PLAIN>
struct Weights {
  static constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  LaneCodes<BITS> codes;
  uint32_t moved[2];
  uint32_t scale[SPANS][2], zero[SPANS][2];  // as they lie there, then ready to use

  // From shared memory; `column` is the first output among those of `grids`.
  template <typename G>
  __device__ __forceinline__ void load(const Tiled& weight,
                                       const uint8_t* tile,
                                       const uint8_t* grids,
                                       int row_tile,
                                       int lane,
                                       int column) {
    codes = read_codes<BITS>(tile, row_tile, lane);
#pragma unroll
    for (int i = 0; i < SPANS * 2; ++i) {
      const int at = column + i % 2 * 8, span = i / 2;
      const uint8_t* scales = grids + span * G::kSpan;
      scale[span][i % 2] = !PLAIN && weight.scale_type == kFloat32
                               ? reinterpret_cast<const uint32_t*>(scales)[at]
                               : reinterpret_cast<const uint16_t*>(scales)[at];
      zero[span][i % 2] = !PLAIN && weight.zeros
                              ? grids[G::kZeros + span * (G::kSpan / 4) + at]
                              : 1 << (BITS - 1);
    }
  }

  // Codes in runs of 64 or 32: give word s the inputs 16 s + 2 q + {0, 1, 8, 9}, what lane q
  // multiplies with where x lies in its own order.  The four lanes of a row transpose what they
  // have, 16 bits at a time, which are two inputs of two outputs.
  __device__ __forceinline__ void begin_order() {
    if constexpr (takes_own_order(BITS, SPANS)) {
      uint32_t(&w)[BITS] = codes.word;
      const bool high = (threadIdx.x & 2) != 0;
      const uint32_t u[4] = {__byte_perm(w[0], w[2], 0x6240), __byte_perm(w[0], w[2], 0x7351),
                             __byte_perm(w[1], w[3], 0x6240), __byte_perm(w[1], w[3], 0x7351)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        moved[i] = __shfl_xor_sync(0xffffffff, high ? u[i] : u[2 + i], 2);
        w[i] = high ? u[2 + i] : u[i];  // what stays
      }
    }
  }

  __device__ __forceinline__ void go_on_order() {
    if constexpr (takes_own_order(BITS, SPANS)) {
      uint32_t(&w)[BITS] = codes.word;
      const bool high = (threadIdx.x & 2) != 0, odd = (threadIdx.x & 1) != 0;
      const uint32_t t[4] = {high ? moved[0] : w[0], high ? moved[1] : w[1],
                             high ? w[0] : moved[0], high ? w[1] : moved[1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        moved[i] = __shfl_xor_sync(0xffffffff, odd ? t[2 * i] : t[2 * i + 1], 1);
        w[i] = odd ? t[2 * i + 1] : t[2 * i];
      }
    }
  }

  __device__ __forceinline__ void end_order() {
    if constexpr (takes_own_order(BITS, SPANS)) {
      uint32_t(&w)[BITS] = codes.word;
      const bool odd = (threadIdx.x & 1) != 0;
      const uint32_t v[4] = {odd ? moved[0] : w[0], odd ? w[0] : moved[0],
                             odd ? moved[1] : w[1], odd ? w[1] : moved[1]};
      w[0] = SPANS == 1 ? v[0] : __byte_perm(v[0], v[1], 0x6240);
      w[1] = SPANS == 1 ? v[1] : __byte_perm(v[2], v[3], 0x6240);
      w[2] = SPANS == 1 ? v[2] : __byte_perm(v[0], v[1], 0x7351);
      w[3] = SPANS == 1 ? v[3] : __byte_perm(v[2], v[3], 0x7351);
    }
  }

  __device__ __forceinline__ void finish_grids(DataType type) {
#pragma unroll
    for (int i = 0; i < SPANS * 2; ++i) {
      scale[i / 2][i % 2] = PLAIN ? twice(scale[i / 2][i % 2]) : pair_of(scale[i / 2][i % 2], type);
      zero[i / 2][i % 2] = shift_of(zero[i / 2][i % 2], i % 2);
    }
  }

  __device__ __forceinline__ static uint32_t pair_of(uint32_t scale, DataType type) {
    if (type == (kIsHalf ? kFloat16 : kBFloat16)) {
      return twice(scale);
    }
    if (type == kFloat32) {
      return Pairs<T>::constant(__uint_as_float(scale));
    }
    return Pairs<T>::constant(kIsHalf ? __uint_as_float(scale << 16)  // of the other 16-bit type
                                      : __half2float(__ushort_as_half(scale)));
  }

  // What takes a zero point off.
  __device__ __forceinline__ static uint32_t shift_of(uint32_t zero, int row) {
    if constexpr (BITS == 4) {  // minus (magic + zero), or a sixteenth of magic + 16 zero
      return twice(kIsHalf && row ? 0xd400 + zero * 16 : (Pairs<T>::kMagic | 0x8000) + zero);
    }
    return Pairs<T>::constant(static_cast<float>((1 << (BITS - 1)) - static_cast<int>(zero)));
  }

  // The operand of one of the four steps.
  __device__ __forceinline__ void decode_step(int step, uint32_t (&a)[4]) const {
    if constexpr (BITS == 4) {
      decode_four(step, a);
    } else {
      decode<BITS, T>(codes, step, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = Pairs<T>::add(a[i], zero[step * SPANS / 4][i % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = Pairs<T>::fma(a[i], scale[step * SPANS / 4][i % 2], 0x80008000u);
    }
  }

  __device__ __forceinline__ void decode_four(int step, uint32_t (&a)[4]) const {
    const uint32_t magic = twice(Pairs<T>::kMagic), word = codes.word[step];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t minus = zero[step * SPANS / 4][i % 2];
      if (kIsHalf && i % 2) {  // codes in bits 4 to 7 as they are
        a[i] = Pairs<T>::fma(masked_or(word >> (i / 2 * 8), 0x00f000f0, magic),
                             Pairs<T>::constant(1.0f / 16), minus);
      } else {
        a[i] = Pairs<T>::add(masked_or(word >> (4 * i), 0x000f000f, magic), minus);
      }
    }
  }
};

}  // namespace auto_gptq::wide
