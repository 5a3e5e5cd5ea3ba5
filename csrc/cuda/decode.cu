// The small operations between the products of one decoding step (../decode.h).
//
// Each takes a microsecond or two, of which the start is the larger part.  So they are few, and they
// are launched programmatically: a kernel's blocks start while those of the kernel before it finish,
// fetch what does not depend on it, and only then wait for it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../decode.h"

namespace auto_gptq {
namespace {

constexpr int kVector = 8;  // elements that a thread reads at once
constexpr int kWarp = 32;

__device__ float as_float(float x) { return x; }
__device__ float as_float(__half x) { return __half2float(x); }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T rounded(float x);
template <>
__device__ float rounded<float>(float x) { return x; }
template <>
__device__ __half rounded<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename T>
struct alignas(16) Vector {
  T at[kVector];

  __device__ void load(const T* from) {
    constexpr int kWords = sizeof(Vector) / 16;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint4*>(this)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  }
  __device__ void store(T* to) const {
    constexpr int kWords = sizeof(Vector) / 16;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(this)[i];
    }
  }
};

// Let the next kernel start.  Its own waiting keeps it from reading too early.
__device__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Wait until the kernels before this one have finished and their writes are visible.
__device__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

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

constexpr int kAttentionThreads = 128;
constexpr int kUnroll = 4;  // keys that a thread has in flight

// A head's channels, spread over kLanes threads of a warp, 8 to each; further threads of the warp
// hold the same head at another position.
template <typename T, int kLanes>
struct Head {
  const DecodeAttention& task;
  int lane;    // of kLanes
  bool holds;  // false in lanes beyond D
  int64_t position;

  __device__ float sum(float x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }

  // Read one head of a new query or key: its 8 channels, normed and rotated.
  __device__ void read(const T* head, const void* norm, float* out) const {
    const int d = task.head_channels, half = task.rotated / 2, c = lane * kVector;
    float factor = 1;
    if (norm) {
      float square = 0;
      for (int e = 0; holds && e < kVector; ++e) {
        const float x = as_float(head[c + e]);
        square += x * x;
      }
      factor = rsqrtf(sum(square) / static_cast<float>(d) + task.epsilon);
    }
    const auto channel = [&](int i) {
      const float x = as_float(head[i]);
      if (!norm) return x;
      const float unit = as_float(rounded<T>(x * factor));
      return as_float(rounded<T>(unit * as_float(static_cast<const T*>(norm)[i])));
    };
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const int i = c + e;
      out[e] = holds ? channel(i) : 0.0f;
      if (holds && i < task.rotated) {
        const int64_t angle = position * task.rotated + i;
        const float other = i < half ? -channel(i + half) : channel(i - half);
        out[e] = as_float(rounded<T>(out[e] * as_float(static_cast<const T*>(task.cosine)[angle]) +
                                     other * as_float(static_cast<const T*>(task.sine)[angle])));
      }
    }
  }
};

// What a set of positions contributes to the output: sum of exp2(score - most) * value.
template <int kHeads>
struct Part {
  float most[kHeads], total[kHeads], value[kHeads][kVector];
};

// Block (split, share, row): kHeads query heads of one key head, one part of the cache.
template <typename T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(DecodeAttention task) {
  constexpr int kSlots = kAttentionThreads / kLanes;  // positions that a block looks at at once
  start_next();
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int d = task.head_channels, group = task.query_heads / task.kv_heads;
  const int shares = group / kHeads;
  const int kv_head = blockIdx.y / shares;
  const int first_head = kv_head * group + blockIdx.y % shares * kHeads;
  const int64_t row = blockIdx.z;
  const int64_t cache = (row * task.kv_heads + kv_head) * task.capacity * d;
  T* keys = static_cast<T*>(task.keys) + cache;
  T* values = static_cast<T*>(task.values) + cache;
  wait_for_previous();
  const int64_t length = *task.length, first = task.first[row];
  const int64_t count = length + 1 - first;
  const int64_t share = (count + task.splits - 1) / task.splits;
  const int64_t begin = first + blockIdx.x * share;
  const int64_t end = min(begin + share, length + 1);
  const Head<T, kLanes> head{task, lane, lane * kVector < d, length - first};
  const T* qkv = static_cast<const T*>(task.qkv) +
                 row * (task.query_heads + 2 * task.kv_heads) * static_cast<int64_t>(d);

  if (begin <= length && length < end) {  // the new key and value belong to this part
    if (slot < kWarp / kLanes) {          // all lanes of the first warp, for the sums within it
      float key[kVector];
      head.read(qkv + (task.query_heads + kv_head) * d, task.k_norm, key);
      if (slot == 0 && head.holds) {
        Vector<T> k, v;
#pragma unroll
        for (int e = 0; e < kVector; ++e) k.at[e] = rounded<T>(key[e]);
        k.store(keys + length * d + lane * kVector);
        v.load(qkv + (task.query_heads + task.kv_heads + kv_head) * d + lane * kVector);
        v.store(values + length * d + lane * kVector);
      }
    }
    __syncthreads();
  }

  float query[kHeads][kVector];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    head.read(qkv + (first_head + h) * d, task.q_norm, query[h]);
#pragma unroll
    for (int e = 0; e < kVector; ++e) query[h][e] *= task.scale * 1.44269504f;  // for exp2
  }

  Part<kHeads> part;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    part.most[h] = -INFINITY;
    part.total[h] = 0;
#pragma unroll
    for (int e = 0; e < kVector; ++e) part.value[h][e] = 0;
  }
  for (int64_t p = begin + slot; p - slot < end; p += kSlots * kUnroll) {
    Vector<T> k[kUnroll], v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = min(p + u * kSlots, end - 1);  // what is beyond may hold anything
      if (head.holds) {
        k[u].load(keys + at * d + lane * kVector);
        v[u].load(values + at * d + lane * kVector);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float score[kUnroll], most = part.most[h];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float dot = 0;
        if (head.holds) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) dot += query[h][e] * as_float(k[u].at[e]);
        }
        dot = head.sum(dot);
        score[u] = p + u * kSlots < end ? dot : -INFINITY;
        most = fmaxf(most, score[u]);
      }
      const float shrink = most == -INFINITY ? 1.0f : exp2f(part.most[h] - most);
      part.most[h] = most;
      part.total[h] *= shrink;
#pragma unroll
      for (int e = 0; e < kVector; ++e) part.value[h][e] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = score[u] == -INFINITY ? 0.0f : exp2f(score[u] - most);
        part.total[h] += weight;
        if (head.holds) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) part.value[h][e] += weight * as_float(v[u].at[e]);
        }
      }
    }
  }

  // Join the slots of this block, then, in the block that comes last, the parts of all blocks.
  __shared__ float most[kSlots], total[kSlots], value[kSlots][kLanes * kVector];
  __shared__ bool last;
  T* out = static_cast<T*>(task.out) + row * task.query_heads * static_cast<int64_t>(d);
  const int stride = d + 2;
  float* partial =
      task.partial +
      (row * task.query_heads + first_head) * static_cast<int64_t>(task.splits) * stride;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (lane == 0) {
      most[slot] = part.most[h];
      total[slot] = part.total[h];
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[slot][lane * kVector + e] = part.value[h][e];
    __syncthreads();
    float highest = -INFINITY, all = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) highest = fmaxf(highest, most[s]);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      all += total[s] == 0.0f ? 0.0f : total[s] * exp2f(most[s] - highest);
    }
    float* own = partial + (static_cast<int64_t>(h) * task.splits + blockIdx.x) * stride;
    for (int c = threadIdx.x; c < d; c += kAttentionThreads) {
      float sum = 0;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        sum += total[s] == 0.0f ? 0.0f : value[s][c] * exp2f(most[s] - highest);
      }
      if (task.splits == 1) {
        out[(first_head + h) * d + c] = rounded<T>(sum / all);
      } else {
        own[c] = sum;
      }
    }
    if (threadIdx.x == 0 && task.splits > 1) {
      own[d] = highest;
      own[d + 1] = all;
    }
    __syncthreads();
  }
  if (task.splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* arrived = task.arrived + row * gridDim.y + blockIdx.y;
    last = atomicAdd(arrived, 1) == task.splits - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = threadIdx.x; i < kHeads * d; i += kAttentionThreads) {
    const float* parts = partial + static_cast<int64_t>(i / d) * task.splits * stride;
    float highest = -INFINITY, sum = 0, all = 0;
    for (int s = 0; s < task.splits; ++s) highest = fmaxf(highest, __ldcg(parts + s * stride + d));
    for (int s = 0; s < task.splits; ++s) {
      const float count = __ldcg(parts + s * stride + d + 1);
      if (count == 0.0f) continue;  // a part without positions
      const float shrink = exp2f(__ldcg(parts + s * stride + d) - highest);
      all += count * shrink;
      sum += __ldcg(parts + s * stride + i % d) * shrink;
    }
    out[(first_head + i / d) * d + i % d] = rounded<T>(sum / all);
  }
}

bool starts_early() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

template <typename Task>
const char* launch(void (*kernel)(Task), dim3 grid, int threads, const Task& task, void* stream) {
  static const bool early = starts_early();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, task);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
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

template <typename T, int kLanes>
const char* attention_of_lanes(const DecodeAttention& task, void* stream) {
  const int32_t heads = heads_per_share(task.query_heads / task.kv_heads);
  const dim3 grid(task.splits, static_cast<unsigned>(task.query_heads / heads),
                  static_cast<unsigned>(task.batch));
  void (*kernel)(DecodeAttention) = attention_kernel<T, kLanes, 1>;
  if (heads == 2) kernel = attention_kernel<T, kLanes, 2>;
  if (heads == 4) kernel = attention_kernel<T, kLanes, 4>;
  return launch(kernel, grid, kAttentionThreads, task, stream);
}

template <typename T>
const char* attention(const DecodeAttention& task, void* stream) {
  if (task.head_channels <= 64) return attention_of_lanes<T, 8>(task, stream);
  if (task.head_channels <= 128) return attention_of_lanes<T, 16>(task, stream);
  return attention_of_lanes<T, 32>(task, stream);
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

const char* auto_gptq_cuda_decode_attention(const DecodeAttention* task, void* stream) {
  if (task->batch == 0) return nullptr;
  if (task->type == kFloat16) return attention<__half>(*task, stream);
  if (task->type == kBFloat16) return attention<__nv_bfloat16>(*task, stream);
  return attention<float>(*task, stream);
}
