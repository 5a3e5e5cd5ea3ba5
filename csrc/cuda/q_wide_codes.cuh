// Codes of a stage as operands of its products.
#pragma once

#include "shared.cuh"
#include "tiles.cuh"

namespace auto_gptq::wide {

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
// A step multiplies 16 inputs in the order that they have in x: lane q of the four of an output
// takes the inputs 2 q and 2 q + 1, and 2 q + 8 and 2 q + 9.  Tiles hold them elsewhere, and a lane
// reads them there.
template <int BITS, typename T, int SPANS, bool PLAIN>
struct Weights {
  static constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  // Of 4 and 8 bits an output's four vectors of 16 bytes are half a line.
  static constexpr auto kSwizzle =
      BITS >= 4 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  uint32_t word[4][2];                       // of each step, of halves of its inputs
  uint32_t high[BITS == 3 ? 4 : 1][2];       // 3 bits: the plane of the highest
  uint32_t scale[SPANS][2], zero[SPANS][2];  // pairs, ready to multiply and to add

  // Whose words have a half of a step, and of what step there (formats/tiles.py), without what
  // depends on q: with runs of 16 codes the lane is q / 2 further, else the step.
  __host__ __device__ static constexpr int lane_of(int step, int half) {
    return SPANS == 1 ? step : SPANS == 2 ? step % 2 * 2 + half : half * 2;
  }
  __host__ __device__ static constexpr int step_of(int step, int half) {
    return SPANS == 1 ? half * 2 : SPANS == 2 ? step / 2 * 2 : step;
  }

  // Where this lane's codes begin in a tile, of which there is one for each four warps.  Of 4 and 8
  // bits two rows, an output's four vectors of 16 bytes, are a line in which vectors are swizzled.
  __device__ __forceinline__ static uint32_t place() {
    const int q = threadIdx.x % 4, r = threadIdx.x % 32 / 4, row_tile = threadIdx.x / 32 % 4;
    const int lane = SPANS == 4 ? q / 2 : 0, step = SPANS == 4 ? 0 : q / 2;
    if constexpr (BITS < 4) {
      return (row_tile * 8 + r) * 32 + lane * 8;
    }
    const int row = row_tile * (BITS * 2) + r;
    const int within = BITS == 4 ? step * 4 : step * 8 + q % 2 * 4;
    return row / 2 * 128 + (row % 2 * 64 ^ row / 2 % 8 * 16 ^ lane * 16) + within;
  }

  // From shared memory: of a warpgroup's tile, and of a block's grids those of output `column`.
  template <typename G>
  __device__ __forceinline__ void load(
      const Tiled& weight, uint32_t tile, uint32_t place, uint32_t grids, int column) {
    const uint32_t at = tile + place;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int lane = lane_of(i / 2, i % 2), step = step_of(i / 2, i % 2);
      uint32_t& w = word[i / 2][i % 2];
      if constexpr (BITS == 4) {
        w = load_word((at ^ lane * 16) + step * 4);
      } else if constexpr (BITS == 8) {
        w = load_word((at ^ (lane * 16 + step / 2 * 64)) + step / 2 * 512 + step % 2 * 8);
      } else {
        w = load_word(at + lane * 8 + step / 2 * 4);
      }
      if constexpr (BITS == 3) {
        high[i / 2][i % 2] = load_word(tile + 1024 + place / 2 + lane * 4);
      }
    }
#pragma unroll
    for (int i = 0; i < SPANS * 2; ++i) {
      const uint32_t from = grids + i / 2 * G::kSpan, n = column + i % 2 * 8;
      scale[i / 2][i % 2] = !PLAIN && weight.scale_type == kFloat32 ? load_word(from + n * 4)
                                                                    : load_half(from + n * 2);
      zero[i / 2][i % 2] = !PLAIN && weight.zeros
                               ? load_byte(grids + G::kZeros + i / 2 * (G::kSpan / 4) + n)
                               : 1 << (BITS - 1);
    }
    if constexpr (BITS == 4) {  // both halves of a step in one word, in the order of the operand
      const uint32_t order = threadIdx.x % 2 ? 0x7351 : 0x6240;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        word[step][0] = __byte_perm(word[step][0], word[step][1], order);
      }
    }
#pragma unroll
    for (int i = 0; i < SPANS * 2; ++i) {
      uint32_t& number = scale[i / 2][i % 2];
      number = PLAIN ? twice(number) : pair_of(number, weight.scale_type);
      zero[i / 2][i % 2] = minus(zero[i / 2][i % 2], i % 2);
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

  // Where the code of an output begins among the mantissa bits of Pairs::kMagic.
  __host__ __device__ static constexpr int shift_of(int row) {
    return row == 0 || BITS == 8 ? 0 : BITS < 4 ? 2 : kIsHalf ? 4 : 0;
  }

  // What takes kMagic and a zero point off.
  __device__ __forceinline__ static uint32_t minus(uint32_t zero, int row) {
    if constexpr (BITS == 8 && !kIsHalf) {
      return Pairs<T>::constant(static_cast<float>(128 - static_cast<int>(zero)));
    }
    const int shift = shift_of(row);
    return twice((Pairs<T>::kMagic | 0x8000) - (shift << Pairs<T>::kMantissa) + (zero << shift));
  }

  // The operand of one of the four steps: of its halves, of two outputs.
  __device__ __forceinline__ void decode_step(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2;
      const uint32_t number = number_of(step, i / 2, row), off = zero[step * SPANS / 4][row];
      a[i] = shift_of(row) == 0
                 ? Pairs<T>::add(number, off)
                 : Pairs<T>::fma(number, Pairs<T>::constant(1.0f / (1 << shift_of(row))), off);
      a[i] = Pairs<T>::fma(a[i], scale[step * SPANS / 4][row], 0x80008000u);
    }
  }

  // kMagic with a code in it.
  __device__ __forceinline__ uint32_t number_of(int step, int half, int row) const {
    const uint32_t magic = twice(Pairs<T>::kMagic), w = word[step][half];
    if constexpr (BITS == 4) {
      const int at = half * 8 + row * 4 - shift_of(row);
      return masked_or(word[step][0] >> at, 0x000f000f << shift_of(row), magic);
    } else if constexpr (BITS == 8 && kIsHalf) {
      return __byte_perm(w, magic, row ? 0x7371 : 0x7270);
    } else if constexpr (BITS == 8) {  // 128 + (code & 127), minus 128 or 256
      return Pairs<T>::add(masked_or(w >> (row * 8), 0x007f007f, magic),
                           unmasked_or(w >> (row * 8), 0x00800080, 0xc300c300));
    } else {
      const int q = threadIdx.x % 4, odd = SPANS == 4 ? step % 2 : q / 2;  // of the step there
      uint32_t base = magic;
      if constexpr (BITS == 3) {
        const uint32_t h = high[step][half];
        const bool swap = SPANS == 1 ? half != 0 : step / 2 != 0;
        base = masked_or((swap ? __byte_perm(h, 0, 0x2301) : h) >> (q % 2 * 4 + odd),
                         0x00040004 << (2 * row), magic);
      }
      return masked_or(w >> (q % 2 * 4 + odd * 8), 0x00030003 << (2 * row), base);
    }
  }
};

}  // namespace auto_gptq::wide
