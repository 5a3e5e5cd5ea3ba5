// Which rows belong to which expert, and the weighted sum of what the experts made of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../experts.h"
#include "device.h"
#include "mma.cuh"

namespace auto_gptq {
namespace {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;

// A block finds the entries of one expert, the last one those of nobody.  Each warp looks at its own
// share of all entries twice: to count, and to put them where they belong, in their order.
__global__ void __launch_bounds__(kSortThreads) sort(const __grid_constant__ Sort task) {
  __shared__ int below[kSortWarps], equal[kSortWarps];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x;
  const int experts = static_cast<int>(task.experts), size = static_cast<int>(task.size);
  const int share = (size + kSortThreads - 1) / kSortThreads * 32;
  const int begin = min(warp * share, size), end = min(begin + share, size);
  const auto owner = [&](int i) {
    const int64_t index = i < end ? task.index[i] : -1;
    return i >= end ? -1 : index < 0 || index >= experts ? experts : static_cast<int>(index);
  };
  int less = 0, same = 0;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) {
    const int own = owner(i);
    less += own < expert;
    same += own == expert;
  }
  less = __reduce_add_sync(~0u, less);
  same = __reduce_add_sync(~0u, same);
  if (lane == 0) {
    below[warp] = less;
    equal[warp] = same;
  }
  __syncthreads();
  int start = 0, at = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    start += below[w];
    at += w < warp ? equal[w] : 0;
  }
  if (threadIdx.x == 0) {
    task.offsets[expert] = start;
  }
  at += start;
  for (int base = begin; base < end && same > 0; base += 32) {
    const int i = base + lane;
    const bool is_own = owner(i) == expert;
    const uint32_t owners = __ballot_sync(~0u, is_own);
    if (is_own) {
      const int place = at + __popc(owners & ((1u << lane) - 1));
      task.places[i] = place;
      task.rows[place] = i / static_cast<int>(task.top_k);
    }
    at += __popc(owners);
  }
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void round_to(float& to, float v) { to = v; }
__device__ __forceinline__ void round_to(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

__device__ __forceinline__ float weight_at(const Combine& task, int64_t at) {
  if (task.weight_type == kFloat32) {
    return static_cast<const float*>(task.weights)[at];
  }
  return task.weight_type == kFloat16 ? widen(static_cast<const __half*>(task.weights)[at])
                                      : widen(static_cast<const __nv_bfloat16*>(task.weights)[at]);
}

template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Vector {
  T value[WIDTH];
};

// A thread makes WIDTH outputs of a token.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(128) combine(const __grid_constant__ Combine task) {
  using Values = Vector<T, WIDTH>;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, n = (blockIdx.y * int64_t{128} + threadIdx.x) * WIDTH;
  if (n >= task.n) {
    return;
  }
  float sum[WIDTH] = {};
#pragma unroll 4
  for (int64_t at = token * task.top_k; at < (token + 1) * task.top_k; ++at) {
    const float weight = weight_at(task, at);
    const T* from = static_cast<const T*>(task.y) + task.places[at] * task.n + n;
    const Values values = *reinterpret_cast<const Values*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      sum[i] += weight * widen(values.value[i]);
    }
  }
  Values values;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    round_to(values.value[i], sum[i]);
  }
  *reinterpret_cast<Values*>(static_cast<T*>(task.out) + token * task.n + n) = values;
}

template <typename T>
const char* start_combine(const Combine& task, cudaStream_t stream) {
  const int width = task.n % 4 == 0 ? 4 : 1;
  const dim3 blocks(static_cast<unsigned>(task.tokens),
                    static_cast<unsigned>((task.n / width + 127) / 128));
  return launch(width == 4 ? combine<T, 4> : combine<T, 1>, task, blocks, 128, 0, stream);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_sort(const Sort* task, void* stream) {
  return launch(sort, *task, static_cast<unsigned>(task->experts + 1), kSortThreads, 0,
                static_cast<cudaStream_t>(stream));
}

const char* auto_gptq_cuda_combine(const Combine* task, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (task->type) {
    case kFloat32:
      return start_combine<float>(*task, on);
    case kFloat16:
      return start_combine<__half>(*task, on);
    default:
      return start_combine<__nv_bfloat16>(*task, on);
  }
}
