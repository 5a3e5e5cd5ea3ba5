// What the kernels for few rows of x are told, and how their instances differ.
#pragma once

#include <cstdint>

#include "../launch.h"

namespace auto_gptq {

struct Small {
  const uint32_t* tiles;
  const void* scales;
  const uint8_t* zeros;
  const int32_t* perm;  // [K] the input at each place, or null
  const void* x;        // in the order of the tiles if perm is null
  const void* bias;
  void* y;
  int32_t m, k, n;
  int32_t scale_stride;   // N'
  int32_t k_tiles;        // K' / 64
  int32_t units;          // of the kernel
  int32_t groups;         // G
  int32_t run;            // 16, 32 or 64 places that share a scale
  int32_t runs_of_group;  // or units
  uint32_t group_of_run;  // multiplier: run (or unit) r is in group umulhi(2 r + 1, group_of_run)
  int32_t scale_bytes;    // 2 or 4
  int32_t scale_shift;    // what makes a scale's bits those of a float: 16 for bf16, 0 for fp32
  int32_t warp_bytes;     // shared memory of a warp
  int32_t x_at;           // where all of x begins in shared memory, if there is a perm
  uint64_t policy;        // of the cache for codes
  DataType scale_type;
};

// What a stage of the ring holds: a unit of the inputs.
enum Unit {
  kPair,    // two tiles with one scale per output
  kTile,    // one tile with one scale per output
  kHalves,  // one tile whose halves of 32 inputs have scales of their own
  kSteps,   // one tile whose four steps of 16 inputs have scales of their own
};

// How x reaches the tensor cores.
enum Activations {
  kRing,       // by the ring, with the codes
  kRegisters,  // straight from global memory, a unit ahead; K is a multiple of a unit
  kByPerm,     // from shared memory, where all of x is brought into the order of the tiles
};

}  // namespace auto_gptq
