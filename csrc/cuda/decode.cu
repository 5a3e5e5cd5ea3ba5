// Norms, gates and the next token of one decoding step (../decode.h).
//
// Each takes a microsecond or two, of which the start is the larger part.  So they are few, and they
// are launched programmatically: a kernel's blocks start while those of the kernel before it finish,
// fetch what does not depend on it, and only then wait for it.
#include "decode.cuh"

namespace auto_gptq {
namespace {

constexpr int kNormThreads = 512;
constexpr int kNormVectors = kMostNormChannels / kNormThreads / kVector;

// One block per row.  kHeld vectors of the row stay in a thread's registers between the two passes.
template <typename T, int kHeld>
__global__ void __launch_bounds__(kNormThreads) add_norm_kernel(AddNorm task) {
  start_next();
  const int t = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * task.channels;
  Vector<T> weight[kHeld], hidden[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (static_cast<int64_t>(i) * kNormThreads + t) * kVector;
    if (c < task.channels) weight[i].load(static_cast<const T*>(task.weight) + c);
  }
  wait_for_previous();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (static_cast<int64_t>(i) * kNormThreads + t) * kVector;
    if (c >= task.channels) continue;
    T* place = static_cast<T*>(task.hidden) + row + c;
    hidden[i].load(place);
    if (task.update) {
      Vector<T> update;
      update.load(static_cast<const T*>(task.update) + row + c);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        hidden[i].at[e] = rounded<T>(as_float(hidden[i].at[e]) + as_float(update.at[e]));
      }
      hidden[i].store(place);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float x = as_float(hidden[i].at[e]);
      sum += x * x;
    }
  }
  __shared__ float sums[kNormThreads / kWarp];
  sum = warp_sum(sum);
  if (t % kWarp == 0) sums[t / kWarp] = sum;
  __syncthreads();
  sum = warp_sum(t % kWarp < kNormThreads / kWarp ? sums[t % kWarp] : 0.0f);
  const float factor = rsqrtf(sum / static_cast<float>(task.channels) + task.epsilon);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (static_cast<int64_t>(i) * kNormThreads + t) * kVector;
    if (c >= task.channels) continue;
    Vector<T> out;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float unit = as_float(rounded<T>(as_float(hidden[i].at[e]) * factor));
      out.at[e] = rounded<T>(unit * as_float(weight[i].at[e]));
    }
    out.store(static_cast<T*>(task.normed) + row + c);
  }
}

constexpr int kGateThreads = 128;

__device__ float silu(float x) { return x / (1.0f + __expf(-x)); }
__device__ float gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <typename T>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(Gate task) {
  start_next();
  wait_for_previous();
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x) * kVector;
  if (c >= task.channels) return;
  const T* from = static_cast<const T*>(task.gate_up) + blockIdx.y * 2 * task.channels + c;
  Vector<T> gate, up;
  gate.load(from);
  up.load(from + task.channels);
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float x = as_float(gate.at[e]);
    const float opened = as_float(rounded<T>(task.gelu ? gelu(x) : silu(x)));
    gate.at[e] = rounded<T>(opened * as_float(up.at[e]));
  }
  gate.store(static_cast<T*>(task.out) + blockIdx.y * task.channels + c);
}

constexpr int kBestThreads = 1024;

struct Best {
  float logit;
  int64_t token;

  __device__ void take(float other, int64_t at) {
    if (other > logit || (other == logit && at < token)) {
      logit = other;
      token = at;
    }
  }
  __device__ void join_warp() {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(~0u, logit, step);
      take(other, __shfl_xor_sync(~0u, token, step));
    }
  }
};

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kBestThreads) append_best_kernel(AppendBest task) {
  start_next();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(task.logits) + row * task.vocabulary;
  Best best{-INFINITY, INT64_MAX};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < task.vocabulary; i += kBestThreads) {
    best.take(as_float(logits[i]), i);
  }
  __shared__ Best of_warp[kBestThreads / kWarp];
  best.join_warp();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  best = of_warp[threadIdx.x];
  best.join_warp();
  if (threadIdx.x > 0) return;
  // Of nothing but NaN, none is the highest.
  const int64_t chosen = best.token == INT64_MAX ? 0 : best.token;
  const bool over = task.stop_count > 0 && task.ended[row];
  const int64_t token = over ? task.padding : chosen;
  task.tokens[row * task.capacity + *task.length] = token;
  for (int64_t i = 0; i < task.stop_count; ++i) {
    if (task.stops[i] == token) task.ended[row] = 1;
  }
}

template <typename T>
const char* append_best(const AppendBest& task, void* stream) {
  return launch(append_best_kernel<T>, dim3(static_cast<unsigned>(task.rows)), kBestThreads, task,
                stream);
}

template <typename T>
const char* add_norm(const AddNorm& task, void* stream) {
  void (*kernel)(AddNorm) = add_norm_kernel<T, kNormVectors>;
  if (task.channels <= kNormThreads * kVector) {
    kernel = add_norm_kernel<T, 1>;
  } else if (task.channels <= 2 * kNormThreads * kVector) {
    kernel = add_norm_kernel<T, 2>;
  }
  return launch(kernel, dim3(static_cast<unsigned>(task.rows)), kNormThreads, task, stream);
}

template <typename T>
const char* gate(const Gate& task, void* stream) {
  constexpr int kChannels = kGateThreads * kVector;
  const dim3 grid(static_cast<unsigned>((task.channels + kChannels - 1) / kChannels),
                  static_cast<unsigned>(task.rows));
  return launch(gate_kernel<T>, grid, kGateThreads, task, stream);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_add_norm(const AddNorm* task, void* stream) {
  if (task->rows == 0) return nullptr;
  if (task->type == kFloat16) return add_norm<__half>(*task, stream);
  if (task->type == kBFloat16) return add_norm<__nv_bfloat16>(*task, stream);
  return add_norm<float>(*task, stream);
}

const char* auto_gptq_cuda_gate(const Gate* task, void* stream) {
  if (task->rows == 0 || task->channels == 0) return nullptr;
  if (task->type == kFloat16) return gate<__half>(*task, stream);
  if (task->type == kBFloat16) return gate<__nv_bfloat16>(*task, stream);
  return gate<float>(*task, stream);
}

const char* auto_gptq_cuda_append_best(const AppendBest* task, void* stream) {
  if (task->rows == 0) return nullptr;
  if (task->type == kFloat16) return append_best<__half>(*task, stream);
  if (task->type == kBFloat16) return append_best<__nv_bfloat16>(*task, stream);
  return append_best<float>(*task, stream);
}
