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

// Measured on an H100, weights in no cache; the first row that a product fits is taken.
struct Row {
  int32_t least_bits, most_bits;
  int64_t least_m, most_m;  // rows of x
  int64_t most_n;           // outputs
  int64_t most_k;           // inputs
  SmallConfig config;
};

constexpr int64_t kAny = INT64_MAX;

// What is in flight counts, and whether there are blocks for all processors: few outputs are parted
// finely, and more warps share out the inputs.  Where the outputs are many, blocks wait for each
// other less if they are small and leave the cache to x.
constexpr Row kTable[] = {
    {2, 8, 9, 16, 4096, 8192, {2, 8, true}},  {2, 8, 9, 16, 4096, kAny, {2, 12, true}},
    {2, 8, 9, 16, 8192, kAny, {2, 8, true}},  {2, 8, 9, 16, 16384, kAny, {2, 4, true}},
    {2, 8, 9, 16, kAny, kAny, {4, 4, true}},  {8, 8, 1, 8, 2048, kAny, {1, 8, false}},
    {2, 4, 1, 8, 2048, kAny, {1, 16, false}}, {4, 4, 1, 1, 4096, 4096, {4, 16, false}},
    {2, 2, 1, 8, 4096, 4096, {2, 16, true}},  {3, 3, 1, 8, 4096, 4096, {2, 8, true}},
    {2, 8, 1, 8, 4096, 12288, {2, 12, true}}, {2, 2, 1, 8, 4096, kAny, {2, 12, true}},
    {3, 8, 1, 8, 4096, kAny, {2, 16, true}},  {4, 4, 1, 8, 8192, kAny, {4, 16, true}},
    {8, 8, 1, 8, kAny, kAny, {4, 12, true}},  {2, 4, 1, 8, kAny, kAny, {4, 8, true}},
};
// Small groups want more warps that decode; x out of order wants few blocks that sort it.
constexpr SmallConfig kSmallGroups{2, 16, true}, kRowOfSmallGroups{4, 16, false};
constexpr SmallConfig kOutOfOrder{4, 16, false}, kManyOutOfOrder{4, 8, false};

// Whether every block brings x into order for itself: for 2 rows that takes up to 1 us, for 3 rows
// 2 to 3 us, and a kernel of its own 2 us.
bool sorts_inside(const Product& product) {
  const int64_t bytes = 2 * product.m * product.weight.k;
  return product.weight.perm && product.m <= 2 && bytes <= current_device().shared_bytes / 2;
}

SmallConfig choose(const Product& product) {
  const Tiled& weight = product.weight;
  if (weight.perm) {
    return weight.n <= 8192 ? kOutOfOrder : kManyOutOfOrder;
  }
  if (weight.run == 32 && weight.bits == 4 && product.m == 1 && weight.k <= 4096 &&
      weight.n > 2048 && weight.n <= 4096) {
    return kRowOfSmallGroups;
  }
  if (weight.run == 16 || (weight.run == 32 && weight.n <= 4096)) {
    return kSmallGroups;
  }
  const auto fits = [&](const Row& row) {
    return weight.bits >= row.least_bits && weight.bits <= row.most_bits &&
           product.m >= row.least_m && product.m <= row.most_m && weight.n <= row.most_n &&
           weight.k <= row.most_k;
  };
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
  return product->weight.perm && !sorts_inside(*product) ? 2 * product->m * product->weight.k : 0;
}

const char* auto_gptq_cuda_q_small(const Product* given, void* stream) {
  Product product = *given;
  if (product.weight.perm && !sorts_inside(product)) {
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
