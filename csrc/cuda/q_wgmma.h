// Between q_wgmma.cu, which chooses, and the files that hold the kernels of one width each.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../launch.h"
#include "tiles.cuh"

namespace auto_gptq {

// How a block is built.
template <int ROWS, int GROUPS, int TILES, int DEPTH>
struct Layout {
  static constexpr int kRows = ROWS;            // of x
  static constexpr int kGroups = GROUPS;        // warpgroups of consumers
  static constexpr int kTiles = TILES;          // tiles of outputs that a warpgroup has
  static constexpr int kDepth = DEPTH;          // tiles of inputs in a stage
  static constexpr int kUnits = TILES * DEPTH;  // tiles that a warpgroup has in a stage
  static constexpr int kColumns = GROUPS * TILES * kSide;
  static constexpr int kConsumers = GROUPS * 128;
  static constexpr int kEights = TILES * ROWS / 8;  // quadruples of sums that a thread has
  static_assert(kUnits % 2 == 0);  // they take turns with two sets of registers
};

// The layouts there are, in the order of q_wgmma.cu's table.
using Rows32 = Layout<32, 3, 1, 2>;
using Rows64 = Layout<64, 3, 1, 2>;
using Rows64Wide = Layout<64, 2, 2, 2>;
using Rows128 = Layout<128, 2, 1, 2>;
using Rows128Wide = Layout<128, 2, 2, 2>;

// What is computed where.
struct Deal : Product {
  CUtensorMap rows;            // boxes of x: the rows of a block, 64 inputs
  int32_t m_blocks, n_blocks;  // results
  int32_t k_tiles;             // of the inputs
  int32_t stages;              // of a result
  int32_t blocks;              // that run
  int32_t split;               // blocks of a cluster, which share a result; 0: stages are dealt out
  int32_t share, longer;       // stages of a block; the first `longer` have one more
  int32_t n_pad;               // of scales
  float4* parts;               // [blocks + results - 1, eights, threads]

  __device__ __forceinline__ int results() const { return m_blocks * n_blocks; }

  // The first of the stages of all results that are dealt to a block, and the block of a stage.
  __device__ __forceinline__ int begin_of(int block) const {
    return block * share + min(block, longer);
  }
  __device__ __forceinline__ int block_of(int stage) const {
    const int behind = stage - longer * (share + 1);
    return behind < 0 ? stage / (share + 1) : longer + behind / share;
  }

  // A block's part of a result: of blocks and results in their order, each step adds one.
  __device__ __forceinline__ float4* part_of(int block, int result, int size) const {
    return parts + int64_t{block + result} * size + threadIdx.x;
  }
};

const char* start_wgmma_2(const Deal& deal, int32_t layout, cudaStream_t stream);
const char* start_wgmma_3(const Deal& deal, int32_t layout, cudaStream_t stream);
const char* start_wgmma_4(const Deal& deal, int32_t layout, cudaStream_t stream);
const char* start_wgmma_8(const Deal& deal, int32_t layout, cudaStream_t stream);

}  // namespace auto_gptq
