// How a product of many rows is parted between clusters of two blocks.
//
// A result is 256 outputs for ROWS rows of x, and computing it takes stages of 64 inputs.  Results
// that would leave multiprocessors idle in the last round are dealt out: every cluster takes an
// equal share of their stages, so of at most two of them, and writes parts to add up.
#pragma once

#include <cuda.h>

#include "../launch.h"
#include "tiles.cuh"

namespace auto_gptq::wide {

constexpr int kColumns = 128;  // outputs of a block
constexpr int kPair = 2 * kColumns;

struct Work {
  int whole;  // results that one cluster computes, by turns
  int dealt;  // the results after them, whose stages are dealt out
  int clusters;
};

struct Task {
  Product p;
  Work work;
  CUtensorMap x, y;
  int x_columns, x_rows;  // how far in the matrix of x the next 64 inputs are
  float4* parts;          // [clusters, 2, 2 blocks, 2 warpgroups, ROWS / 8, 128 threads]
};

// Whether the kernel brings codes into the order of x; if not, x is arranged (arrange.h).
__host__ __device__ constexpr bool takes_own_order(int bits, int spans) { return bits == 4 && spans == 1; }

struct Part {
  int result, begin, end;  // a result and its stages
  int slot;                // of a part in the workspace, or -1: the whole result
};

struct Place {
  int m, n;  // the first row of x and the first output of a cluster
};

template <int ROWS>
struct Results {
  int m_blocks, n_blocks, stages;

  __host__ __device__ explicit Results(const Product& p)
      : m_blocks(static_cast<int>((p.m + ROWS - 1) / ROWS)),
        n_blocks(static_cast<int>((p.weight.n + kPair - 1) / kPair)),
        stages(static_cast<int>((p.weight.k + kSide - 1) / kSide)) {}

  // Clusters that run together share rows of x and tiles: four in a row have the same outputs.
  __device__ __forceinline__ Place place_of(int result) const {
    const int band = result / (4 * n_blocks), inside = result % (4 * n_blocks);
    const int height = min(m_blocks - band * 4, 4);
    return {(band * 4 + inside % height) * ROWS, inside / height * kPair};
  }
};

__host__ __device__ inline int share_begin(const Work& work, int stages, int cluster) {
  return static_cast<int>(int64_t{work.dealt} * stages * cluster / work.clusters);
}

// Call act(part) for all that this cluster computes.
template <typename Do>
__device__ __forceinline__ void for_parts(const Work& work, int stages, const Do& act) {
  const int cluster = blockIdx.x / 2;
  int result = cluster, slot = cluster * 2, begin = share_begin(work, stages, cluster);
  const int end = share_begin(work, stages, cluster + 1);
#pragma unroll 1
  while (result < work.whole || begin < end) {
    Part part{result, 0, stages, -1};
    if (result < work.whole) {
      result += work.clusters;
    } else {
      const int dealt = begin / stages, stop = min(end, (dealt + 1) * stages);
      part = {work.whole + dealt, begin - dealt * stages, stop - dealt * stages, slot++};
      begin = stop;
    }
    act(part);
  }
}

}  // namespace auto_gptq::wide
