// Loads and stores of shared memory by address, which keep their order among waits for barriers.
#pragma once

#include <cstdint>

#include "tiles.cuh"

namespace auto_gptq {

__device__ __forceinline__ uint32_t load_half(uint32_t from) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ uint32_t load_byte(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ uint32_t load_word(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ uint4 load_vector(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ float4 load_quadruple(uint32_t from) {
  const uint4 v = load_vector(from);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                     __uint_as_float(v.w));
}

__device__ __forceinline__ void store_word(uint32_t to, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store_vector(uint32_t to, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}

// A lane's codes of a tile that begins at `tile`, of one of its row tiles.
template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> read_codes(uint32_t tile, int row_tile, int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 2 || BITS == 3) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(codes.word[0]), "=r"(codes.word[1])
                 : "r"(tile + row_tile * 256 + lane * 8));
    if constexpr (BITS == 3) {
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(codes.word[2])
                   : "r"(tile + 1024 + row_tile * 128 + lane * 4));
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(codes.word[4 * i]), "=r"(codes.word[4 * i + 1]),
                     "=r"(codes.word[4 * i + 2]), "=r"(codes.word[4 * i + 3])
                   : "r"(tile + (row_tile * (BITS / 4) + i) * 512 + lane * 16));
    }
  }
  return codes;
}

// Codes of 16 inputs per lane, 4 bits, runs of 64: give word s the inputs 16 s + 2 q and the next,
// and eight further the same, what lane q multiplies with where x lies in its own order.  The four
// lanes of a row transpose what they have.
__device__ __forceinline__ void order_codes(uint32_t (&w)[4]) {
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
  const uint32_t u[4] = {__byte_perm(w[0], w[2], 0x6240), __byte_perm(w[0], w[2], 0x7351),
                         __byte_perm(w[1], w[3], 0x6240), __byte_perm(w[1], w[3], 0x7351)};
  uint32_t moved[2], t[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    moved[i] = __shfl_xor_sync(0xffffffff, high ? u[i] : u[2 + i], 2);
    w[i] = high ? u[2 + i] : u[i];
  }
  t[0] = high ? moved[0] : w[0];
  t[1] = high ? moved[1] : w[1];
  t[2] = high ? w[0] : moved[0];
  t[3] = high ? w[1] : moved[1];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    moved[i] = __shfl_xor_sync(0xffffffff, odd ? t[2 * i] : t[2 * i + 1], 1);
    w[i] = odd ? t[2 * i + 1] : t[2 * i];
  }
  const uint32_t stay[2] = {w[0], w[1]};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    w[2 * i] = odd ? moved[i] : stay[i];
    w[2 * i + 1] = odd ? stay[i] : moved[i];
  }
}

}  // namespace auto_gptq
