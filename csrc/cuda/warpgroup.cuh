// What warpgroups do around their products: rings of stages, codes in shared memory, sums.
#pragma once

#include <cstdint>

#include "store.cuh"
#include "tiles.cuh"

namespace auto_gptq {

template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> read_codes(const uint8_t* tile, int row_tile, int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 2 || BITS == 3) {
    const uint2 v = reinterpret_cast<const uint2*>(tile)[row_tile * 32 + lane];
    codes.word[0] = v.x;
    codes.word[1] = v.y;
    if constexpr (BITS == 3) {
      codes.word[2] = reinterpret_cast<const uint32_t*>(tile)[256 + row_tile * 32 + lane];
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(tile)[(row_tile * (BITS / 4) + i) * 32 + lane];
      codes.word[4 * i] = v.x;
      codes.word[4 * i + 1] = v.y;
      codes.word[4 * i + 2] = v.z;
      codes.word[4 * i + 3] = v.w;
    }
  }
  return codes;
}

// A position in a ring of stages, and the parity of its rounds.
template <int STAGES>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace auto_gptq
