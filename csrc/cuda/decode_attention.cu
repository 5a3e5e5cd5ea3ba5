// Attention of new tokens to a cache of keys and values (../decode.h).
#include <cooperative_groups.h>

#include "decode.cuh"

namespace auto_gptq {
namespace {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kMostInCluster = 8;      // blocks, on every GPU that has clusters
constexpr int64_t kLeastPositions = 64;  // for less, no further block looks at the cache

// kHeads query heads of one key head and one part of the cache: what a block works on.
template <typename T, int kLanes, int kHeads>
struct Attention {
  // A head's D channels lie on kLanes threads, 8 each; a block looks at kSlots positions at once,
  // kUnroll times.
  static constexpr int kSlots = kAttentionThreads / kLanes;
  static constexpr int kUnroll = kHeads == 4 ? 2 : 4;
  static constexpr int kEarly = 8;
  static constexpr int kItems = kHeads + 2;  // new heads: queries, the key, the value
  static constexpr int kChannels = kLanes * kVector;  // at least D

  struct Shared {
    float raw[kItems][kChannels];    // as the product gave them, normed
    float ready[kItems][kChannels];  // rotated, the queries scaled as well
    float most[kAttentionWarps][kHeads], total[kAttentionWarps][kHeads];
    float value[kAttentionWarps][kHeads][kChannels];
    float share[kHeads][kMostSplits];
    float highest[kHeads], whole[kHeads];
    bool last;
  };

  const DecodeAttention& task;
  Shared& shared;
  int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int d, kv_head, first_head;
  bool holds;  // false in lanes beyond D
  int64_t row, length, first, begin, end, step = kSlots * kUnroll;
  int parts;
  T *keys, *values;
  Vector<T> k[kUnroll], v[kUnroll];
  float most[kHeads], total[kHeads], value[kHeads][kVector];

  __device__ Attention(const DecodeAttention& task, Shared& shared) : task(task), shared(shared) {
    const int group = task.query_heads / task.kv_heads, shares = group / kHeads;
    d = task.head_channels;
    kv_head = blockIdx.y / shares;
    first_head = kv_head * group + blockIdx.y % shares * kHeads;
    holds = lane * kVector < d;
    row = blockIdx.z;
    length = *task.length;
    first = task.first[row];
    const int64_t count = length + 1 - first;
    parts = static_cast<int>(min(static_cast<int64_t>(task.splits),
                                 (count + kLeastPositions - 1) / kLeastPositions));
    const int64_t part = (count + parts - 1) / parts;
    parts = static_cast<int>((count + part - 1) / part);  // none is empty
    begin = first + blockIdx.x * part;
    end = min(begin + part, length + 1);
    const int64_t cache = (row * task.kv_heads + kv_head) * task.capacity * d;
    keys = static_cast<T*>(task.keys) + cache;
    values = static_cast<T*>(task.values) + cache;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      most[h] = -INFINITY;
      total[h] = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) value[h][e] = 0;
    }
  }

  // The new key is not in the cache yet.
  __device__ bool is_cached(int64_t p) const { return holds && p < end && p < length; }

  __device__ void load(int64_t p) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (is_cached(p + u * kSlots)) k[u].load(keys + (p + u * kSlots) * d + lane * kVector);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (is_cached(p + u * kSlots)) v[u].load(values + (p + u * kSlots) * d + lane * kVector);
    }
  }

  __device__ static float lanes_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }

  __device__ const T* new_head(int item) const {
    int64_t head = first_head + item;
    if (item >= kHeads) head = task.query_heads + (item - kHeads) * task.kv_heads + kv_head;
    const int64_t heads = task.query_heads + 2 * task.kv_heads;
    return static_cast<const T*>(task.qkv) + (row * heads + head) * d;
  }

  // Read the new heads, norm and rotate them; the block with the last part appends to the cache.
  __device__ void take_new_heads() {
    for (int item = slot; item - slot < kItems; item += kSlots) {  // the same for all of a warp
      const bool used = item < kItems && holds;
      float x[kVector], square = 0;
      Vector<T> read;
      if (used) read.load(new_head(item) + lane * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        x[e] = used ? as_float(read.at[e]) : 0.0f;
        square += x[e] * x[e];
      }
      const void* norm = item < kHeads ? task.q_norm : item == kHeads ? task.k_norm : nullptr;
      const float factor =
          rsqrtf(lanes_sum(square) / static_cast<float>(d) + task.epsilon);  // before any branch
      if (!used) continue;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int c = lane * kVector + e;
        if (norm) {
          const float unit = as_float(rounded<T>(x[e] * factor));
          x[e] = as_float(rounded<T>(unit * as_float(static_cast<const T*>(norm)[c])));
        }
        shared.raw[item][c] = x[e];
      }
    }
    __syncthreads();
    const int half = task.rotated / 2;
    const T* cosine = static_cast<const T*>(task.cosine) + (length - first) * task.rotated;
    const T* sine = static_cast<const T*>(task.sine) + (length - first) * task.rotated;
    for (int i = threadIdx.x; i < kItems * d; i += kAttentionThreads) {
      const int item = i / d, c = i % d;
      float x = shared.raw[item][c];
      if (item <= kHeads && c < task.rotated) {
        const float other = c < half ? -shared.raw[item][c + half] : shared.raw[item][c - half];
        x = as_float(rounded<T>(x * as_float(cosine[c]) + other * as_float(sine[c])));
      }
      if (end == length + 1 && item >= kHeads) {
        (item == kHeads ? keys : values)[length * d + c] = rounded<T>(x);
      }
      shared.ready[item][c] = item < kHeads ? x * task.scale * 1.44269504f : x;  // for exp2
    }
    __syncthreads();
  }

  __device__ void fold(int64_t p) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (p + u * kSlots == length && holds) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          k[u].at[e] = rounded<T>(shared.ready[kHeads][lane * kVector + e]);
          v[u].at[e] = rounded<T>(shared.ready[kHeads + 1][lane * kVector + e]);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float* query = shared.ready[h] + lane * kVector;
      float score[kUnroll], highest = most[h];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float dot = 0;
        if (holds) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) dot += query[e] * as_float(k[u].at[e]);
        }
        dot = lanes_sum(dot);
        score[u] = p + u * kSlots < end ? dot : -INFINITY;
        highest = fmaxf(highest, score[u]);
      }
      const float shrink = highest == -INFINITY ? 1.0f : exp2f(most[h] - highest);
      most[h] = highest;
      total[h] *= shrink;
#pragma unroll
      for (int e = 0; e < kVector; ++e) value[h][e] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (score[u] == -INFINITY) continue;  // what was not loaded may be anything
        const float weight = exp2f(score[u] - highest);
        total[h] += weight;
#pragma unroll
        for (int e = 0; e < kVector; ++e) value[h][e] += weight * as_float(v[u].at[e]);
      }
    }
  }

  // Join the slots of each warp, then the warps.  Leaves the highest score, the sum of weights and
  // the weighted sum of values of each head with warp 0.
  __device__ void join() {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int step = kLanes; step < kWarp; step *= 2) {
        const float other = __shfl_xor_sync(~0u, most[h], step);
        const float highest = fmaxf(most[h], other);
        const float shrink = highest == -INFINITY ? 0.0f : exp2f(most[h] - highest);
        most[h] = highest;
        total[h] *= shrink;
        total[h] += __shfl_xor_sync(~0u, total[h], step);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          value[h][e] *= shrink;
          value[h][e] += __shfl_xor_sync(~0u, value[h][e], step);
        }
      }
      if (threadIdx.x % kWarp < kLanes && holds) {
        shared.most[warp][h] = most[h];
        shared.total[warp][h] = total[h];
#pragma unroll
        for (int e = 0; e < kVector; ++e) shared.value[warp][h][lane * kVector + e] = value[h][e];
      }
    }
    __syncthreads();
  }

  __device__ T* output() const {
    return static_cast<T*>(task.out) +
           (row * task.query_heads + first_head) * static_cast<int64_t>(d);
  }

  // Join the warps: give channel c of head h, and put the head's highest score and sum of weights
  // into shared memory.
  __device__ float joined(int h, int c) {
    float highest = -INFINITY, all = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) highest = fmaxf(highest, shared.most[w][h]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float shrink = exp2f(shared.most[w][h] - highest);  // 0 for a warp without positions
      all += shared.total[w][h] * shrink;
      sum += shared.value[w][h][c] * shrink;
    }
    if (c == 0) {
      shared.highest[h] = highest;
      shared.whole[h] = all;
    }
    return parts == 1 ? sum / all : sum;
  }

  __device__ void write() {
    const int stride = d + 2;
    float* partial = task.partial + (row * task.query_heads + first_head) *
                                        static_cast<int64_t>(task.splits) * stride;
    T* out = output();
    for (int i = threadIdx.x; i < kHeads * d; i += kAttentionThreads) {
      const int h = i / d, c = i % d;
      const float sum = joined(h, c);
      if (parts == 1) {
        out[i] = rounded<T>(sum);
        continue;
      }
      float* own = partial + (static_cast<int64_t>(h) * task.splits + blockIdx.x) * stride;
      own[c] = sum;
      if (c == 0) {
        own[d] = shared.highest[h];
        own[d + 1] = shared.whole[h];
      }
    }
    if (parts > 1 && comes_last()) write_joined(partial, out);
  }

#if __CUDA_ARCH__ >= 900
  // The same where the parts are the blocks of a cluster, which read each other's shared memory.
  __device__ void write_in_cluster() {
    const auto cluster = cooperative_groups::this_cluster();
    T* out = output();
    for (int i = threadIdx.x; begin < end && i < kHeads * d; i += kAttentionThreads) {
      const float sum = joined(i / d, i % d);
      if (parts == 1) out[i] = rounded<T>(sum);
      shared.value[0][i / d][i % d] = sum;  // read by nobody else before the clusters meet
    }
    if (parts == 1) return;
    cluster.sync();
    const int share = (kHeads * d + parts - 1) / parts;
    const int i = blockIdx.x * share + threadIdx.x;  // share is at most the number of threads
    if (static_cast<int>(threadIdx.x) < share && i < kHeads * d && blockIdx.x < parts) {
      const int h = i / d, c = i % d;
      float most[kMostInCluster], sum = 0, all = 0, highest = -INFINITY;
#pragma unroll
      for (int p = 0; p < kMostInCluster; ++p) {
        most[p] = p < parts ? cluster.map_shared_rank(&shared, p)->highest[h] : -INFINITY;
        highest = fmaxf(highest, most[p]);
      }
#pragma unroll
      for (int p = 0; p < kMostInCluster; ++p) {
        if (p >= parts) continue;
        const Shared* other = cluster.map_shared_rank(&shared, p);
        const float shrink = exp2f(most[p] - highest);
        all += other->whole[h] * shrink;
        sum += other->value[0][h][c] * shrink;
      }
      out[i] = rounded<T>(sum / all);
    }
    cluster.sync();  // nobody leaves while its memory is read
  }
#endif

  __device__ bool comes_last() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* arrived = task.arrived + row * gridDim.y + blockIdx.y;
      shared.last = atomicAdd(arrived, 1) == parts - 1;
      if (shared.last) *arrived = 0;
    }
    __syncthreads();
    return shared.last;
  }

  // Join the parts of all blocks.
  __device__ void write_joined(const float* partial, T* out) {
    __threadfence();
    const int stride = d + 2, warp = threadIdx.x / kWarp, s = threadIdx.x % kWarp;
    const auto part_of = [&](int i) {
      return partial + static_cast<int64_t>(i / d) * task.splits * stride + i % d;
    };
    float early[kEarly];  // asked for together with what decides about their weights
#pragma unroll
    for (int p = 0; p < kEarly; ++p) {
      const bool given = p < parts && threadIdx.x < kHeads * d;
      early[p] = given ? __ldcg(part_of(threadIdx.x) + p * stride) : 0.0f;
    }
    for (int h = warp; h < kHeads; h += kAttentionWarps) {  // a lane for each part
      const float* part = partial + (static_cast<int64_t>(h) * task.splits + s) * stride + d;
      const float own = s < parts ? __ldcg(part) : -INFINITY;
      const float count = s < parts ? __ldcg(part + 1) : 0.0f;
      float highest = own;
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
      }
      const float shrink = exp2f(own - highest);
      shared.share[h][s] = shrink;
      const float all = warp_sum(count * shrink);
      if (s == 0) shared.whole[h] = all;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kHeads * d; i += kAttentionThreads) {
      const int h = i / d;
      const bool first_round = i == threadIdx.x;
      float sum = 0;
#pragma unroll
      for (int p = 0; p < kEarly; ++p) {
        if (first_round && p < parts) sum += early[p] * shared.share[h][p];
      }
#pragma unroll 8
      for (int p = first_round ? kEarly : 0; p < parts; ++p) {
        sum += __ldcg(part_of(i) + p * stride) * shared.share[h][p];
      }
      out[i] = rounded<T>(sum / shared.whole[h]);
    }
  }
};

// Block (part, share of heads, row).
template <typename T, int kLanes, int kHeads, bool kCluster>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(DecodeAttention task) {
  __shared__ typename Attention<T, kLanes, kHeads>::Shared shared;
  start_next();
  Attention<T, kLanes, kHeads> attention(task, shared);
  if (attention.begin < attention.end) {
    int64_t p = attention.begin + attention.slot;
    attention.load(p);
    wait_for_previous();
    attention.take_new_heads();
    for (;;) {
      attention.fold(p);
      p += attention.step;
      if (p - attention.slot >= attention.end) break;
      attention.load(p);
    }
    attention.join();
  } else {
    wait_for_previous();  // so that whoever waits for this kernel has waited for that one too
    if (!kCluster) return;
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (kCluster) {
    attention.write_in_cluster();
    return;
  }
#endif
  attention.write();
}

template <typename T, int kLanes, int kHeads>
void (*choose_kernel(bool cluster))(DecodeAttention) {
  return cluster ? attention_kernel<T, kLanes, kHeads, true>
                 : attention_kernel<T, kLanes, kHeads, false>;
}

template <typename T, int kLanes>
const char* attention_of_lanes(const DecodeAttention& task, void* stream) {
  const int32_t heads = heads_per_share(task.query_heads / task.kv_heads);
  const dim3 grid(task.splits, static_cast<unsigned>(task.query_heads / heads),
                  static_cast<unsigned>(task.batch));
  const bool cluster = is_sm90() && task.splits > 1 && task.splits <= kMostInCluster;
  void (*kernel)(DecodeAttention) = choose_kernel<T, kLanes, 1>(cluster);
  if (heads == 2) kernel = choose_kernel<T, kLanes, 2>(cluster);
  if (heads == 4) kernel = choose_kernel<T, kLanes, 4>(cluster);
  return launch(kernel, grid, kAttentionThreads, task, stream, cluster ? task.splits : 1);
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

const char* auto_gptq_cuda_decode_attention(const DecodeAttention* task, void* stream) {
  if (task->batch == 0) return nullptr;
  if (task->type == kFloat16) return attention<__half>(*task, stream);
  if (task->type == kBFloat16) return attention<__nv_bfloat16>(*task, stream);
  return attention<float>(*task, stream);
}
