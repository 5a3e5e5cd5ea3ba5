// Codes as operands of tensor cores without arithmetic: as numbers that sums of x make right later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tiles.cuh"

namespace auto_gptq {

// How codes become numbers without arithmetic: row h of a pair of rows is unit(h) * code + base.
// fp16: the code's bits alone are a subnormal number.  bf16: they are put into 128's mantissa.
template <int BITS, typename T>
struct Raw {
  static constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  static constexpr uint32_t kMagic = kIsHalf ? 0 : 0x43004300;

  __device__ static constexpr float base() {
    return kIsHalf ? 0.0f : BITS == 8 ? -128.0f : 128.0f;
  }
  __device__ static constexpr float unit(int h) {
    const float step = BITS == 4 && kIsHalf ? 16.0f : BITS < 4 ? 4.0f : 1.0f;
    return (kIsHalf ? 1.0f / (1 << 24) : 1.0f) * (h ? step : 1.0f);
  }

  __device__ __forceinline__ static uint32_t field(uint32_t word, uint32_t mask) {
    return kIsHalf ? word & mask : masked_or(word, mask, kMagic);
  }

  __device__ __forceinline__ static void operand(const LaneCodes<BITS>& codes,
                                                 int step,
                                                 uint32_t (&a)[4]) {
    if constexpr (BITS == 8 && !kIsHalf) {
      decode<BITS, T>(codes, step, a);
    } else if constexpr (BITS == 8) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        a[f] = codes.word[2 * step + f / 2] >> (f % 2 * 8) & 0x00ff00ff;
      }
    } else if constexpr (BITS == 4) {
      const uint32_t word = codes.word[step];
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const bool stays = kIsHalf && f % 2 == 1;  // times 16
        a[f] = field(word >> (stays ? f * 4 - 4 : f * 4), stays ? 0x00f000f0 : 0x000f000f);
      }
    } else {
      const int word = step / 2, odd = step % 2;
      const uint32_t low = codes.word[word] >> (8 * odd);
      if constexpr (BITS == 2) {
        const uint32_t second = low >> 4;
        a[0] = field(low, 0x00030003);
        a[1] = field(low, 0x000c000c);
        a[2] = field(second, 0x00030003);
        a[3] = field(second, 0x000c000c);
      } else {
        const uint32_t plane = codes.word[2], high = plane >> (8 * word + odd);
        const uint32_t wrapped = word ? plane << (8 - odd) : high;
        if constexpr (kIsHalf) {
          split(masked_or(low, 0x00330033, high & 0x00440044), 0x00070007, a[0], a[2]);
          const uint32_t upper = word ? masked_or(wrapped, 0x01000100, high & 0x00100010)
                                      : high & 0x01100110;
          split(masked_or(low, 0x00cc00cc, upper), 0x001c001c, a[1], a[3]);
        } else {
          a[0] = masked_or(low, 0x00030003, field(high, 0x00040004));
          a[1] = masked_or(low, 0x000c000c, field(high, 0x00100010));
          a[2] = masked_or(low >> 4, 0x00030003, field(high >> 4, 0x00040004));
          a[3] = masked_or(low >> 4, 0x000c000c, field(wrapped >> 4, 0x00100010));
        }
      }
    }
  }

  // The same in fewer operations, where a number can hold the codes of both rows of a pair: row 0
  // is unit(0) * code + what row 1 is.  Whoever has sums of both takes row 1's from row 0's.
  static constexpr bool kNests = BITS == 4 && kIsHalf;

  __device__ __forceinline__ static void nested(const LaneCodes<BITS>& codes,
                                                int step,
                                                uint32_t (&a)[4]) {
    if constexpr (kNests) {
      const uint32_t word = codes.word[step];
      a[0] = word & 0x00ff00ff;
      a[1] = word & 0x00f000f0;
      a[2] = __byte_perm(word, 0, 0x4341);  // the other bytes
      a[3] = a[2] & 0x00f000f0;
    } else {
      operand(codes, step, a);
    }
  }

  // Two codes, of which one is 16 times the other's unit, as two numbers of one unit.  Differences of
  // subnormal numbers are exact, and leave shifts and masks, which wait for each other, alone.
  __device__ __forceinline__ static void split(uint32_t both,
                                               uint32_t mask,
                                               uint32_t& lower,
                                               uint32_t& upper) {
    lower = both & mask;
    const uint32_t difference = Pairs<T>::fma(lower, Pairs<T>::constant(-1.0f), both);
    upper = Pairs<T>::fma(difference, Pairs<T>::constant(1.0f / 16), 0);
  }
};

// Read a lane's codes of one of the row tiles that lie in shared memory as they do in a tile.
template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> read_codes(const char* stage,
                                                      int rw,
                                                      int row_tiles,
                                                      int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 4 || BITS == 8) {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(stage)[(rw * (BITS / 4) + i) * 32 + lane];
      codes.word[4 * i] = v.x;
      codes.word[4 * i + 1] = v.y;
      codes.word[4 * i + 2] = v.z;
      codes.word[4 * i + 3] = v.w;
    }
  } else {
    const uint2 v = reinterpret_cast<const uint2*>(stage)[rw * 32 + lane];
    codes.word[0] = v.x;
    codes.word[1] = v.y;
    if constexpr (BITS == 3) {
      const char* plane = stage + 256 * row_tiles;
      codes.word[2] = reinterpret_cast<const uint32_t*>(plane)[rw * 32 + lane];
    }
  }
  return codes;
}

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (Pairs<T>::kMantissa == 10) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

}  // namespace auto_gptq
