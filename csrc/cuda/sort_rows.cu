// x of many rows with its inputs sorted by group, for act-order.
#include <algorithm>

#include "arrange.h"
#include "device.h"
#include "mma.cuh"

namespace auto_gptq {
namespace {

constexpr int kThreads = 512;
constexpr int kMostShared = 96 << 10;  // two blocks fit on a multiprocessor

struct Sort {
  const uint16_t* x;    // [M, K]
  const int32_t* perm;  // [K]
  uint16_t* sorted;     // out [M, K]
  int64_t m;
  int k;
  int rows;     // of a block; they share what it reads of perm
  bool staged;  // rows come to shared memory first, which they do unless they are too long
};

// A thread writes eight inputs at a time.
__global__ void __launch_bounds__(kThreads) sort(const __grid_constant__ Sort task) {
  extern __shared__ uint4 shared[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t first = int64_t{blockIdx.x} * task.rows;
  const int rows = static_cast<int>(min(int64_t{task.rows}, task.m - first));
  const int vectors = task.k / 8;
  const uint4* from = reinterpret_cast<const uint4*>(task.x + first * task.k);
  if (task.staged) {
    for (int i = threadIdx.x; i < rows * vectors; i += kThreads) {
      shared[i] = from[i];
    }
    __syncthreads();
    from = shared;
  }
  uint4* to = reinterpret_cast<uint4*>(task.sorted + first * task.k);
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const int4 low = reinterpret_cast<const int4*>(task.perm)[2 * i];
    const int4 high = reinterpret_cast<const int4*>(task.perm)[2 * i + 1];
    for (int r = 0; r < rows; ++r) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(from + r * vectors);
      const auto pair = [&](int a, int b) {
        return row[a] | static_cast<uint32_t>(row[b]) << 16;
      };
      to[r * vectors + i] = make_uint4(pair(low.x, low.y), pair(low.z, low.w),
                                       pair(high.x, high.y), pair(high.z, high.w));
    }
  }
}

}  // namespace

const char* sort_rows(const Product& product, void* to, cudaStream_t stream) {
  const int64_t k = product.weight.k;
  const int rows = static_cast<int>(std::clamp<int64_t>(kMostShared / (2 * k), 1, 4));
  const bool staged = rows * k * 2 <= current_device().shared_bytes;
  const Sort task{static_cast<const uint16_t*>(product.x), product.weight.perm,
                  static_cast<uint16_t*>(to), product.m, static_cast<int>(k), rows,
                  staged};
  const auto blocks = static_cast<unsigned>((product.m + rows - 1) / rows);
  return launch(sort, task, dim3(blocks), kThreads, staged ? static_cast<int>(rows * k * 2) : 0,
                stream);
}

}  // namespace auto_gptq
