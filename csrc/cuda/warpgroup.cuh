// What surrounds the products of warpgroups: rings of stages, sums.
#pragma once

#include <cstdint>

#include "store.cuh"
#include "tiles.cuh"

namespace auto_gptq {

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
