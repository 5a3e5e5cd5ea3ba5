// Products of hundreds of rows of x on Hopper: what is computed where, and how it is started.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "arrange.h"
#include "device.h"
#include "q_matmul.h"
#include "q_wide.cuh"
#include "tensor_map.h"

namespace auto_gptq {
namespace {

using namespace wide;

// Add up the parts of dealt results: 8 rows of 64 outputs per block.
template <typename T, int ROWS>
__global__ void __launch_bounds__(128) add_parts(const __grid_constant__ Task task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Product& p = task.p;
  const Results<ROWS> results(p);
  constexpr int kEights = ROWS / 8;
  const int eight = blockIdx.x % kEights, quarter = blockIdx.x / kEights % 4;
  const int dealt = blockIdx.x / (4 * kEights);
  const int n = static_cast<int>(p.weight.n), m = static_cast<int>(p.m);
  const Place place = results.place_of(task.work.whole + dealt);
  const int begin = dealt * results.stages, end = begin + results.stages;
  const int64_t total = int64_t{task.work.dealt} * results.stages;
  int cluster = static_cast<int>(((int64_t{begin} + 1) * task.work.clusters - 1) / total);
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (; share_begin(task.work, results.stages, cluster) < end; ++cluster) {
    const int slot = cluster * 2 + (share_begin(task.work, results.stages, cluster) < begin);
    const float4 part = task.parts[((slot * 4 + quarter) * kEights + eight) * 128 + threadIdx.x];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = place.m + eight * 8 + lane / 4, output = place.n + quarter * kSide + warp * 16;
  if (output >= n) {  // a multiple of 32
    return;
  }
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + output + lane / 4;
    const float low = static_cast<float>(bias[0]), high = static_cast<float>(bias[8]);
    sum.x += low;
    sum.y += low;
    sum.z += high;
    sum.w += high;
  }
  const uint32_t low = transpose(pack<T>(sum.x, sum.y)), high = transpose(pack<T>(sum.z, sum.w));
  if (row < m) {
    T* to = static_cast<T*>(p.y) + static_cast<int64_t>(row) * n + output + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(to) = low;
    *reinterpret_cast<uint32_t*>(to + 8) = high;
  }
#endif
}

// x as the kernel reads it: with act-order its inputs are sorted first, and then it may be arranged.
struct Reading {
  int64_t arranged, sorted;  // bytes at the beginning of the workspace

  explicit Reading(const Product& p) {
    const auto whole = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    arranged = takes_own_order(p.weight.bits, p.weight.run == kSide ? 1 : 4)
                   ? 0
                   : whole(arranged_bytes(p));
    sorted = p.weight.perm ? whole(2 * p.m * p.weight.k) : 0;
  }
};

const char* read_x(Task& task, const Reading& reading, int box_rows, cudaStream_t stream) {
  Product& p = task.p;
  if (reading.sorted) {
    void* sorted = static_cast<uint8_t*>(p.workspace) + reading.arranged;
    if (const char* failure = sort_rows(p, sorted, stream)) {
      return failure;
    }
    p.x = sorted;
    p.weight.perm = nullptr;
  }
  if (reading.arranged == 0) {
    task.x_columns = kSide;
    task.x_rows = 0;
    return describe_matrix(task.x, p.x, p.type, p.m, p.weight.k, box_rows,
                           CU_TENSOR_MAP_SWIZZLE_128B);
  }
  task.x_columns = 0;
  task.x_rows = static_cast<int>(arranged_rows(p.m));
  const char* failure = arrange(p, stream);
  return failure ? failure
                 : describe_matrix(task.x, p.workspace, p.type, arranged_bytes(p) / 128, kSide,
                                   box_rows, CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <int BITS, typename T, int ROWS, int SPANS>
const char* start(Task& task, cudaStream_t stream) {
  const Reading reading(task.p);
  task.parts = reinterpret_cast<float4*>(static_cast<uint8_t*>(task.p.workspace) +
                                         reading.arranged + reading.sorted);
  const char* failure = read_x(task, reading, ROWS / 2, stream);
  if (!failure) {
    failure = describe_matrix(task.y, task.p.y, task.p.type, task.p.m, task.p.weight.n, kBoxRows,
                              CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (!failure) {
    failure = launch(q_wide<BITS, T, ROWS, SPANS>, task, dim3(2 * task.work.clusters), kThreads,
                     Ring<BITS, ROWS, SPANS>::kBytes, stream);
  }
  if (!failure && task.work.dealt) {
    failure = launch(add_parts<T, ROWS>, task, dim3(task.work.dealt * 4 * (ROWS / 8)), 128, 0,
                     stream);
  }
  return failure;
}

// What a stage of 64 inputs costs a cluster, in nanoseconds, measured on an H100 at work everywhere.
constexpr struct {
  int rows, stage;
} kCosts[] = {{128, 550}, {192, 640}, {256, 750}};
constexpr int kAdding = 2000;  // to start the kernel that adds up parts
constexpr double kPart = 0.6;  // to store and add up a part, for each of its rows of x

struct Choice {
  int rows;
  Work work;
};

Choice choose(const Product& p, int multiprocessors) {
  const int stages = static_cast<int>((p.weight.k + kSide - 1) / kSide);
  const int clusters = std::max(multiprocessors / 2, 1);
  Choice best = {};
  double least = 1e300;
  const auto consider = [&](int rows, double time, const Work& work) {
    if (time < least) {
      least = time;
      best = {rows, work};
    }
  };
  for (const auto& cost : kCosts) {
    const int64_t n_blocks = (p.weight.n + kPair - 1) / kPair;
    const int count = static_cast<int>((p.m + cost.rows - 1) / cost.rows * n_blocks);
    const int full = count / clusters, rest = count % clusters;
    const double round = static_cast<double>(stages) * cost.stage;
    consider(cost.rows, (full + (rest > 0)) * round, {count, 0, std::min(clusters, count)});
    if (rest > 0) {
      const int dealers = std::min(full ? clusters : clusters / rest * rest, rest * stages);
      const int parts = dealers % rest ? dealers + rest : dealers;
      const double time = (full + static_cast<double>(rest) / dealers) * round + kAdding +
                          kPart * parts * cost.rows;
      consider(cost.rows, time, {count - rest, rest, dealers});
    }
  }
  return best;
}

template <int BITS, typename T, int SPANS>
const char* start_rows(Task& task, int rows, cudaStream_t stream) {
  switch (rows) {
    case 128:
      return start<BITS, T, 128, SPANS>(task, stream);
    case 192:
      return start<BITS, T, 192, SPANS>(task, stream);
    default:
      return start<BITS, T, 256, SPANS>(task, stream);
  }
}

template <int BITS>
const char* start_type(Task& task, int rows, cudaStream_t stream) {
  const bool one_group = task.p.weight.run == kSide;
  if (task.p.type == kFloat16) {
    return one_group ? start_rows<BITS, __half, 1>(task, rows, stream)
                     : start_rows<BITS, __half, 4>(task, rows, stream);
  }
  return one_group ? start_rows<BITS, __nv_bfloat16, 1>(task, rows, stream)
                   : start_rows<BITS, __nv_bfloat16, 4>(task, rows, stream);
}

int64_t parts_bytes(const Choice& choice) {
  return choice.work.dealt ? int64_t{choice.work.clusters} * 2 * kPair * choice.rows * 4 : 0;
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cuda_q_wide_bytes(const Product* product) {
  const Reading reading(*product);
  return reading.arranged + reading.sorted +
         parts_bytes(choose(*product, current_device().processors));
}

const char* auto_gptq_cuda_q_wide(const Product* product, void* stream) {
  const Choice choice = choose(*product, current_device().processors);
  Task task{*product, choice.work};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (product->weight.bits) {
    case 2:
      return start_type<2>(task, choice.rows, on);
    case 3:
      return start_type<3>(task, choice.rows, on);
    case 4:
      return start_type<4>(task, choice.rows, on);
    default:
      return start_type<8>(task, choice.rows, on);
  }
}
