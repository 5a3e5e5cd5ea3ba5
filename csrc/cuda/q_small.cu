// Up to 16 rows of x: how the work is divided for a shape, and x brought into the tiles' order.
#include "q_small.h"

#include <cuda_runtime.h>

#include "device.h"
#include "mma.cuh"
#include "q_matmul.h"

namespace auto_gptq {
namespace {

// Measured on an H100 (benchmarks/kernels.py); the first row that a product fits is taken.
struct Row {
  int32_t most_m;
  int64_t least_n;  // outputs
  SmallConfig config;
};

constexpr Row kTable[] = {
    {8, 0, {2, 8, 1, 1 << 20}},
    {16, 0, {2, 8, 1, 1 << 20}},
};

SmallConfig choose(const Product& product) {
  for (const Row& row : kTable) {
    if (product.m <= row.most_m && product.weight.n >= row.least_n) {
      return row.config;
    }
  }
  return kTable[0].config;
}

// Little of x is sorted by each block of the kernel itself, which saves a kernel in front of it.
bool sorts_itself(const Product& product) {
  return product.m <= 2 && product.m * product.weight.k <= 16384;
}

struct Gather {
  const uint16_t* x;  // [M, K]
  const int32_t* perm;
  uint16_t* sorted;  // out [M, K]
  int32_t k;
};

// A thread brings 8 values together.
__global__ void __launch_bounds__(128) gather(const __grid_constant__ Gather task) {
  let_next_kernel_start();
  const int place = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (place >= task.k) {
    return;
  }
  int4 from[2];
  from[0] = reinterpret_cast<const int4*>(task.perm + place)[0];
  from[1] = reinterpret_cast<const int4*>(task.perm + place)[1];
  wait_for_previous_kernel();
  const int64_t row = static_cast<int64_t>(blockIdx.y) * task.k;
  const uint16_t* x = task.x + row;
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    v[2 * i] = x[from[i].x] | static_cast<uint32_t>(x[from[i].y]) << 16;
    v[2 * i + 1] = x[from[i].z] | static_cast<uint32_t>(x[from[i].w]) << 16;
  }
  *reinterpret_cast<uint4*>(task.sorted + row + place) = make_uint4(v[0], v[1], v[2], v[3]);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_gather(const Product* product, void* stream) {
  const int64_t k = product->weight.k;
  const Gather task{static_cast<const uint16_t*>(product->x), product->weight.perm,
                    static_cast<uint16_t*>(product->workspace), static_cast<int32_t>(k)};
  const dim3 blocks((k / 8 + 127) / 128, product->m);
  return launch(gather, task, blocks, 128, 0, static_cast<cudaStream_t>(stream));
}

int64_t auto_gptq_cuda_sorted_x_bytes(const Product* product) {
  return product->weight.perm ? 2 * product->m * product->weight.k : 0;
}

int64_t auto_gptq_cuda_q_small_workspace(const Product* product) {
  return sorts_itself(*product) ? 0 : auto_gptq_cuda_sorted_x_bytes(product);
}

const char* auto_gptq_cuda_q_small(const Product* given, void* stream) {
  Product product = *given;
  if (product.weight.perm && !sorts_itself(product)) {
    const char* failure = auto_gptq_cuda_gather(given, stream);
    if (failure) {
      return failure;
    }
    product.x = product.workspace;
    product.weight.perm = nullptr;
  }
  const SmallConfig config = choose(product);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (product.weight.bits) {
    case 2:
      return start_small_2(product, config, on);
    case 3:
      return start_small_3(product, config, on);
    case 4:
      return start_small_4(product, config, on);
    default:
      return start_small_8(product, config, on);
  }
}
