// Up to 16 rows of x: how the work is divided for a shape, and x brought into the tiles' order.
#include "q_small.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "device.h"
#include "mma.cuh"
#include "q_matmul.h"

namespace auto_gptq {
namespace {

// Measured on an H100 with weights that are in no cache; the first row that a product fits is taken.
struct Row {
  int64_t most_n;  // outputs
  int64_t most_k;  // inputs
  SmallConfig config;
};

constexpr int64_t kAny = INT64_MAX;

// What is in flight counts, and whether there are blocks for all processors: few outputs are parted
// finely, and more warps share out the inputs.
constexpr Row kTable[] = {
    {2048, kAny, {1, 16}},
    {4096, 4096, {4, 16}},
    {4096, kAny, {2, 16}},
    {8192, kAny, {4, 16}},
    {kAny, kAny, {4, 8}},
};
// From 9 rows of x on, and for 8 bits, there is less room for codes; small groups and few bits want
// more warps that decode.
constexpr SmallConfig kManyRows{2, 8}, kEightBits{1, 8}, kFewBytes{2, 16};

SmallConfig choose(const Product& product) {
  const Tiled& weight = product.weight;
  if (product.m > 8) {
    return kManyRows;
  }
  if (weight.run != 64 || (weight.bits < 4 && weight.n > 2048 && weight.n <= 8192)) {
    return kFewBytes;
  }
  if (weight.bits == 8) {
    return kEightBits;
  }
  const auto fits = [&](const Row& row) { return weight.n <= row.most_n && weight.k <= row.most_k; };
  return std::find_if(std::begin(kTable), std::end(kTable), fits)->config;
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

const char* auto_gptq_cuda_q_small(const Product* given, void* stream) {
  Product product = *given;
  if (product.weight.perm) {
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
