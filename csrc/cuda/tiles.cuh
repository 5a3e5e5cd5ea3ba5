// How a lane reads its codes out of a tile and turns them into numbers for tensor cores.
//
// auto_gptq/formats/tiles.py has the picture of the layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../launch.h"

namespace auto_gptq {

constexpr int kSide = 64;  // outputs and inputs of a tile

// The 32 codes of a lane: of 2 outputs and 16 inputs.
template <int BITS>
struct LaneCodes {
  uint32_t word[BITS];
};

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from));
  return v;
}

__device__ __forceinline__ uint32_t load_once(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// Read a lane's codes of one row tile.
template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> load_codes(const uint32_t* tile,
                                                      int row_tile,  // 0..3
                                                      int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 2 || BITS == 3) {
    const uint2 v = load_once(reinterpret_cast<const uint2*>(tile) + row_tile * 32 + lane);
    codes.word[0] = v.x;
    codes.word[1] = v.y;
    if constexpr (BITS == 3) {
      codes.word[2] = load_once(tile + 256 + row_tile * 32 + lane);
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      const uint4* vectors = reinterpret_cast<const uint4*>(tile);
      const uint4 v = load_once(vectors + (row_tile * (BITS / 4) + i) * 32 + lane);
      codes.word[4 * i] = v.x;
      codes.word[4 * i + 1] = v.y;
      codes.word[4 * i + 2] = v.z;
      codes.word[4 * i + 3] = v.w;
    }
  }
  return codes;
}

// (a & mask) | b
__device__ __forceinline__ uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(b));
  return result;
}

// (~a & mask) | b
__device__ __forceinline__ uint32_t unmasked_or(uint32_t a, uint32_t mask, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(result) : "r"(a), "r"(mask), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t twice(uint32_t half) { return half << 16 | half; }

// What differs between fp16 and bf16: a number whose lowest mantissa bits count ones, how many
// mantissa bits there are, and the arithmetic on pairs.
template <typename T>
struct Pairs;

template <>
struct Pairs<__half> {
  static constexpr int kMantissa = 10;
  static constexpr int kMagic = 0x6400;  // 1024
  __device__ static uint32_t constant(float value) {
    return twice(__half_as_ushort(__float2half(value)));
  }
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  __device__ static uint32_t add(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  __device__ static float2 widen(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

template <>
struct Pairs<__nv_bfloat16> {
  static constexpr int kMantissa = 7;
  static constexpr int kMagic = 0x4300;  // 128
  __device__ static uint32_t constant(float value) { return twice(__float_as_uint(value) >> 16); }
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
  }
  __device__ static uint32_t add(uint32_t a, uint32_t b) { return fma(a, constant(1.0f), b); }
  __device__ static float2 widen(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
  }
};

// Whether decode takes zeros off as they are: with 8 bits bf16 has no room for them above kMagic.
template <int BITS, typename T>
constexpr bool kPlainZeros = BITS == 8 && Pairs<T>::kMantissa == 7;

// A zero as decode takes it off: a pair of it, or of kMagic plus it.
template <int BITS, typename T>
__device__ __forceinline__ uint32_t pair_of_zero(uint32_t zero) {
  if constexpr (kPlainZeros<BITS, T>) {
    return Pairs<T>::constant(static_cast<float>(zero));
  }
  return zero * 0x00010001u + twice(Pairs<T>::kMagic);
}

// A field that starts at bit `shift` of the mantissa of kMagic: give the code minus the middle one,
// or if ZEROS minus what pair_of_zero holds.
template <int BITS, typename T, bool ZEROS>
__device__ __forceinline__ uint32_t centred(uint32_t magic, int shift, uint32_t zero) {
  const float unit = 1.0f / (1 << shift), whole = 1 << Pairs<T>::kMantissa;
  if constexpr (ZEROS) {
    if (shift == 0) {
      return Pairs<T>::fma(zero, Pairs<T>::constant(-1.0f), magic);
    }
    const uint32_t minus = Pairs<T>::fma(zero, Pairs<T>::constant(-1.0f),
                                         Pairs<T>::constant(whole - whole * unit));
    return Pairs<T>::fma(magic, Pairs<T>::constant(unit), minus);
  }
  const uint32_t minus = Pairs<T>::constant(-(whole * unit + (1 << (BITS - 1))));
  return shift == 0 ? Pairs<T>::add(magic, minus)
                    : Pairs<T>::fma(magic, Pairs<T>::constant(unit), minus);
}

// The A operand of one step of mma.m16n8k16: codes minus 2^(bits - 1), or if ZEROS minus the zero of
// the output, r0 or r1, of which `zeros` has what pair_of_zero gives; exact in both types.
//
// a[0] = r0, i 0 and 1; a[1] = r1, i 0 and 1; a[2] = r0, i 2 and 3; a[3] = r1, i 2 and 3.
template <int BITS, typename T, bool ZEROS = false>
__device__ __forceinline__ void decode(const LaneCodes<BITS>& codes,
                                       int step,
                                       uint32_t (&a)[4],
                                       const uint32_t (&zeros)[2] = {}) {
  constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  const uint32_t magic = twice(Pairs<T>::kMagic);
  if constexpr (BITS == 4) {
    const uint32_t word = codes.word[step];
    if constexpr (kIsHalf) {
      a[0] = centred<4, T, ZEROS>(masked_or(word, 0x000f000f, magic), 0, zeros[0]);
      a[1] = centred<4, T, ZEROS>(masked_or(word, 0x00f000f0, magic), 4, zeros[1]);
      a[2] = centred<4, T, ZEROS>(masked_or(word >> 8, 0x000f000f, magic), 0, zeros[0]);
      a[3] = centred<4, T, ZEROS>(masked_or(word >> 8, 0x00f000f0, magic), 4, zeros[1]);
    } else {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const uint32_t field = masked_or(word >> (4 * f), 0x000f000f, magic);
        a[f] = centred<4, T, ZEROS>(field, 0, zeros[f % 2]);
      }
    }
  } else if constexpr (BITS == 8) {
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const uint32_t word = codes.word[2 * step + f / 2] >> (f % 2 * 8);
      if constexpr (kIsHalf) {
        a[f] = centred<8, T, ZEROS>(masked_or(word, 0x00ff00ff, magic), 0, zeros[f % 2]);
      } else {  // 128 + (code & 127), minus 128 or 256
        a[f] = Pairs<T>::add(masked_or(word, 0x007f007f, magic),
                             unmasked_or(word, 0x00800080, 0xc300c300));
        if constexpr (ZEROS) {
          const uint32_t minus = Pairs<T>::constant(-1.0f), middle = Pairs<T>::constant(128.0f);
          a[f] = Pairs<T>::add(a[f], Pairs<T>::fma(zeros[f % 2], minus, middle));
        }
      }
    }
  } else {  // 2 bits, or 3 of which the highest lies in a plane of its own, two bits further up
    const uint32_t low = codes.word[step / 2] >> (step % 2 * 8);
    const uint32_t high = BITS == 3 ? codes.word[2] >> (step / 2 * 8 + step % 2) : 0;
    const uint32_t wrapped = BITS == 3 ? codes.word[2] << (8 - step % 2) : 0;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const uint32_t upper = step >= 2 && f == 3 ? wrapped : high;
      const uint32_t mask = 0x00030003u << (2 * f), upper_mask = 0x00040004u << (2 * f);
      if (kIsHalf || f < 3) {
        const uint32_t base = BITS == 3 ? masked_or(upper, upper_mask, magic) : magic;
        a[f] = centred<BITS, T, ZEROS>(masked_or(low, mask, base), 2 * f, zeros[f % 2]);
      } else {  // beyond the mantissa of bf16
        const uint32_t base = BITS == 3 ? upper & upper_mask : 0;
        const uint32_t code = masked_or(low, mask, base) >> 6;
        a[f] = centred<BITS, T, ZEROS>(code | magic, 0, zeros[f % 2]);
      }
    }
  }
}

// The place, inside a tile, of input i = 0 of a step.
__device__ __forceinline__ int place_of(int step, int q, int run) {
  const int steps = run / 16;
  return step / steps * run + q * (run / 4) + step % steps * 4;
}

__device__ __forceinline__ float load_scale(const void* scales, int64_t at, DataType type) {
  if (type == kFloat32) {
    return static_cast<const float*>(scales)[at];
  }
  const uint32_t bits = static_cast<const uint16_t*>(scales)[at];
  return type == kFloat16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(bits << 16);
}

}  // namespace auto_gptq
