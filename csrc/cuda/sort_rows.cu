// x of many rows with its inputs sorted by group, for act-order.
#include <algorithm>

#include "arrange.h"
#include "device.h"
#include "mma.cuh"

namespace auto_gptq {
namespace {

constexpr int kMostShared = 96 << 10;  // two blocks fit on a multiprocessor

struct Sort {
  const uint16_t* x;    // [M, K]
  const int32_t* perm;  // [K]
  uint16_t* sorted;     // out [M, K]
  int64_t m;
  int k;
  int rows;   // of a block; they share what it reads of perm
  int parts;  // blocks that share the outputs of those rows
};

// A thread writes eight inputs at a time.  STAGED: rows come to shared memory first, which they do
// unless they are too long.
template <int THREADS, bool STAGED>
__global__ void __launch_bounds__(THREADS, 2) sort(const __grid_constant__ Sort task) {
  extern __shared__ uint4 shared[];
  let_next_kernel_start();
  const int vectors = task.k / 8, part = blockIdx.x % task.parts;
  const int64_t first = int64_t{blockIdx.x / task.parts} * task.rows;
  const int rows = static_cast<int>(min(int64_t{task.rows}, task.m - first));
  const int4* perm = reinterpret_cast<const int4*>(task.perm);
  const int end = vectors * (part + 1) / task.parts;
  int i = vectors * part / task.parts + threadIdx.x;
  int4 low = {}, high = {};
  if (i < end) {  // perm comes with the weight: no kernel in front writes it
    low = perm[2 * i];
    high = perm[2 * i + 1];
  }
  wait_for_previous_kernel();
  const uint4* from = reinterpret_cast<const uint4*>(task.x + first * task.k);
  if constexpr (STAGED) {
#pragma unroll 2
    for (int j = threadIdx.x; j < rows * vectors; j += THREADS) {
      shared[j] = from[j];
    }
    __syncthreads();
  }
  uint4* to = reinterpret_cast<uint4*>(task.sorted + first * task.k);
  while (i < end) {
    for (int r = 0; r < rows; ++r) {
      const auto* row = reinterpret_cast<const uint16_t*>((STAGED ? shared : from) + r * vectors);
      const auto pair = [&](int a, int b) {
        return row[a] | static_cast<uint32_t>(row[b]) << 16;
      };
      to[r * vectors + i] = make_uint4(pair(low.x, low.y), pair(low.z, low.w),
                                       pair(high.x, high.y), pair(high.z, high.w));
    }
    i += THREADS;
    if (i < end) {
      low = perm[2 * i];
      high = perm[2 * i + 1];
    }
  }
}

}  // namespace

// Measured on an H100: few rows fill it if they are parted, and all threads write at once; many
// rows save reads of perm.
const char* sort_rows(const Product& product, void* to, cudaStream_t stream) {
  const int64_t k = product.weight.k, m = product.m;
  const int64_t fit = std::clamp<int64_t>(kMostShared / (2 * k), 1, 4);
  const int rows = m < 1024 ? 1 : static_cast<int>(fit);
  const int parts = static_cast<int>(std::min((k + 5119) / 5120, std::max<int64_t>(264 / m, 1)));
  const Sort task{static_cast<const uint16_t*>(product.x),
                  product.weight.perm,
                  static_cast<uint16_t*>(to),
                  m,
                  static_cast<int>(k),
                  rows,
                  parts};
  const dim3 blocks(static_cast<unsigned>((m + rows - 1) / rows * parts));
  const int bytes = static_cast<int>(rows * k * 2);
  if (bytes > current_device().shared_bytes) {
    return launch(sort<512, false>, task, blocks, 512, 0, stream);
  }
  return m <= 256 ? launch(sort<1024, true>, task, blocks, 1024, bytes, stream)
                  : launch(sort<512, true>, task, blocks, 512, bytes, stream);
}

}  // namespace auto_gptq
