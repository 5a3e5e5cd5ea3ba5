// The small operations of a decoding step (../decode.h): vectors of 8 channels, sums in fp32.
#include "../decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../packed.h"

namespace auto_gptq {
namespace {

constexpr int kLanes = 8;
using V = Floats<kLanes>;
using Bits = Ints<kLanes>;

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

AUTO_GPTQ_INLINE V read(const float* from) { return load<V>(from); }
AUTO_GPTQ_INLINE V read(const Float16* from) {
  typedef Float16 Eight __attribute__((vector_size(kLanes * sizeof(Float16))));
  return __builtin_convertvector(load<Eight>(from), V);
}
AUTO_GPTQ_INLINE V read(const BFloat16* from) {
  return load<V>(reinterpret_cast<const char*>(
      &static_cast<const Bits&>(__builtin_convertvector(load<Halves>(from), Bits) << 16)));
}

AUTO_GPTQ_INLINE void write(float* to, V value) { store(to, value); }
AUTO_GPTQ_INLINE void write(Float16* to, V value) {
  typedef Float16 Eight __attribute__((vector_size(kLanes * sizeof(Float16))));
  store(to, __builtin_convertvector(value, Eight));
}
AUTO_GPTQ_INLINE void write(BFloat16* to, V value) {
  Words<kLanes> bits = load<Words<kLanes>>(&value);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
  store(to, __builtin_convertvector(bits, Halves));
}

// Round to the type and back.
template <typename T>
AUTO_GPTQ_INLINE V rounded(V value) {
  T held[kLanes];
  write(held, value);
  return read(held);
}

AUTO_GPTQ_INLINE float sum(V value) {
  return ((value[0] + value[4]) + (value[1] + value[5])) +
         ((value[2] + value[6]) + (value[3] + value[7]));
}

// e^x to about two units in the last place: 2^n times a polynomial of the rest (Cephes' expf).
AUTO_GPTQ_INLINE V exponential(V x) {
  const V least = V{} - 87.0f, most = V{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const V scaled = x * 1.44269504f;
  const Bits n = __builtin_convertvector(scaled + (scaled < 0.0f ? V{} - 0.5f : V{} + 0.5f), Bits);
  const V whole = __builtin_convertvector(n, V);
  const V rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  V value = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  const Bits power = (n + 127) << 23;
  return value * load<V>(&power);
}

template <typename T>
AUTO_GPTQ_INLINE void add_norm_row(const AddNorm& task, int64_t row) {
  T* hidden = static_cast<T*>(task.hidden) + row * task.channels;
  const T* update =
      task.update ? static_cast<const T*>(task.update) + row * task.channels : nullptr;
  const T* weight = static_cast<const T*>(task.weight);
  T* normed = static_cast<T*>(task.normed) + row * task.channels;
  V squares{};
  for (int64_t c = 0; c < task.channels; c += kLanes) {
    V x = read(hidden + c);
    if (update) {
      x = rounded<T>(x + read(update + c));
      write(hidden + c, x);
    }
    squares += x * x;
  }
  const float factor =
      1.0f / std::sqrt(sum(squares) / static_cast<float>(task.channels) + task.epsilon);
  for (int64_t c = 0; c < task.channels; c += kLanes) {
    write(normed + c, rounded<T>(read(hidden + c) * factor) * read(weight + c));
  }
}

template <typename T>
AUTO_GPTQ_INLINE void gate_row(const Gate& task, int64_t row) {
  const T* opening = static_cast<const T*>(task.gate_up) + row * 2 * task.channels;
  const T* up = opening + task.channels;
  T* out = static_cast<T*>(task.out) + row * task.channels;
  for (int64_t c = 0; c < task.channels; c += kLanes) {
    const V x = read(opening + c);
    // tanh's gelu is x * sigmoid(2 z): (1 + tanh z) / 2 = sigmoid(2 z)
    const V slope = task.gelu ? x * (1.59576912f + 0.0713548162726f * x * x) : x;
    const V opened = x / (1.0f + exponential(-slope));
    write(out + c, rounded<T>(opened) * read(up + c));
  }
}

// Norm and rotate one head at the position of the new token.
template <typename T>
AUTO_GPTQ_INLINE void turn_head(
    const DecodeAttention& task, const T* head, const T* norm, int64_t position, float* out) {
  const int64_t d = task.head_channels, half = task.rotated / 2;
  float x[256];
  V squares{};
  for (int64_t c = 0; c < d; c += kLanes) {
    const V value = read(head + c);
    squares += value * value;
    store(x + c, value);
  }
  if (norm) {
    const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(d) + task.epsilon);
    for (int64_t c = 0; c < d; c += kLanes) {
      store(x + c, rounded<T>(rounded<T>(load<V>(x + c) * factor) * read(norm + c)));
    }
  }
  std::copy(x, x + d, out);
  T cosine[256], sine[256];
  const T* table = static_cast<const T*>(task.cosine) + position * task.rotated;
  std::copy(table, table + task.rotated, cosine);
  table = static_cast<const T*>(task.sine) + position * task.rotated;
  std::copy(table, table + task.rotated, sine);
  float other[256];
  for (int64_t c = 0; c < half; ++c) {
    other[c] = -x[c + half];
    other[c + half] = x[c];
  }
  for (int64_t c = 0; c < task.rotated; c += kLanes) {
    const V turned = load<V>(x + c) * read(cosine + c) + load<V>(other + c) * read(sine + c);
    store(out + c, rounded<T>(turned));
  }
  std::copy(x + task.rotated, x + d, out + task.rotated);
}

template <typename T>
AUTO_GPTQ_INLINE const T* new_head(const DecodeAttention& task, int64_t row, int64_t head) {
  const int64_t heads = task.query_heads + 2 * task.kv_heads;
  return static_cast<const T*>(task.qkv) + (row * heads + head) * task.head_channels;
}

template <typename T>
AUTO_GPTQ_INLINE void append(const DecodeAttention& task) {
  const int64_t d = task.head_channels, length = *task.length;
  for (int64_t row = 0; row < task.batch; ++row) {
    for (int64_t p = 0; p < task.kv_heads; ++p) {
      const int64_t place = ((row * task.kv_heads + p) * task.capacity + length) * d;
      float key[256];
      turn_head(task, new_head<T>(task, row, task.query_heads + p),
                static_cast<const T*>(task.k_norm), length - task.first[row], key);
      const T* value = new_head<T>(task, row, task.query_heads + task.kv_heads + p);
      for (int64_t c = 0; c < d; c += kLanes) {
        write(static_cast<T*>(task.keys) + place + c, load<V>(key + c));
      }
      std::copy(value, value + d, static_cast<T*>(task.values) + place);
    }
  }
}

template <typename T>
AUTO_GPTQ_INLINE void attend(const DecodeAttention& task, int64_t index, float* scores) {
  const int64_t d = task.head_channels, length = *task.length;
  const int64_t row = index / task.query_heads, head = index % task.query_heads;
  const int64_t kv_head = head / (task.query_heads / task.kv_heads);
  const int64_t first = task.first[row], count = length + 1 - first;
  const int64_t cache = ((row * task.kv_heads + kv_head) * task.capacity + first) * d;
  const T* keys = static_cast<const T*>(task.keys) + cache;
  const T* values = static_cast<const T*>(task.values) + cache;
  float query[256];
  turn_head(task, new_head<T>(task, row, head), static_cast<const T*>(task.q_norm), length - first,
            query);
  float most = -INFINITY;
  for (int64_t p = 0; p < count; ++p) {
    V dot{};
    for (int64_t c = 0; c < d; c += kLanes) dot += load<V>(query + c) * read(keys + p * d + c);
    scores[p] = sum(dot) * task.scale;
    most = std::max(most, scores[p]);
  }
  std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, -INFINITY);
  V totals{};
  for (int64_t p = 0; p < count; p += kLanes) {
    const V weight = exponential(load<V>(scores + p) - most);
    store(scores + p, weight);
    for (int64_t e = 0; e < kLanes; ++e) totals[e] += p + e < count ? weight[e] : 0.0f;
  }
  const float total = sum(totals);
  float out[256] = {};
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < d; c += kLanes) {
      store(out + c, load<V>(out + c) + scores[p] * read(values + p * d + c));
    }
  }
  T* place = static_cast<T*>(task.out) + index * d;
  for (int64_t c = 0; c < d; c += kLanes) write(place + c, load<V>(out + c) / total);
}

template <typename T>
AUTO_GPTQ_INLINE void attend_all(const DecodeAttention& task, int64_t begin, int64_t end) {
  std::vector<float> scores((*task.length + 1 + kLanes) / kLanes * kLanes);
  for (int64_t index = begin; index < end; ++index) attend<T>(task, index, scores.data());
}

template <typename T>
AUTO_GPTQ_INLINE void norm_all(const AddNorm& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) add_norm_row<T>(task, row);
}

template <typename T>
AUTO_GPTQ_INLINE void gate_all(const Gate& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) gate_row<T>(task, row);
}

template <typename T>
AUTO_GPTQ_INLINE void append_all(const DecodeAttention& task, int64_t, int64_t) {
  append<T>(task);
}

// Define name(task, begin, end, isa): work for every type, compiled for every instruction set.
#define AUTO_GPTQ_BY_TYPE(work, task, begin, end)                            \
  if ((task).type == kFloat32) return work<float>(task, begin, end);         \
  if ((task).type == kFloat16) return work<Float16>(task, begin, end);       \
  return work<BFloat16>(task, begin, end);

#ifdef __x86_64__
#define AUTO_GPTQ_FOR_AVX2(name, work, Task)                                               \
  __attribute__((target("avx2,fma,f16c"))) void name##_avx2(const Task& task, int64_t begin, \
                                                            int64_t end) {                 \
    AUTO_GPTQ_BY_TYPE(work, task, begin, end)                                              \
  }
#define AUTO_GPTQ_TRY_AVX2(name) \
  if (isa >= kAvx2) return name##_avx2(task, begin, end);
#else
#define AUTO_GPTQ_FOR_AVX2(name, work, Task)
#define AUTO_GPTQ_TRY_AVX2(name)
#endif

#define AUTO_GPTQ_DEFINE(name, work, Task)                               \
  AUTO_GPTQ_FOR_AVX2(name, work, Task)                                   \
  void name(const Task& task, int64_t begin, int64_t end, Isa isa) {     \
    AUTO_GPTQ_TRY_AVX2(name)                                             \
    AUTO_GPTQ_BY_TYPE(work, task, begin, end)                            \
  }

AUTO_GPTQ_DEFINE(run_add_norm, norm_all, AddNorm)
AUTO_GPTQ_DEFINE(run_gate, gate_all, Gate)
AUTO_GPTQ_DEFINE(run_append, append_all, DecodeAttention)
AUTO_GPTQ_DEFINE(run_attend, attend_all, DecodeAttention)

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

void auto_gptq_cpu_add_norm(const AddNorm* task, int64_t begin, int64_t end, Isa isa) {
  run_add_norm(*task, begin, end, isa);
}

void auto_gptq_cpu_gate(const Gate* task, int64_t begin, int64_t end, Isa isa) {
  run_gate(*task, begin, end, isa);
}

void auto_gptq_cpu_decode_append(const DecodeAttention* task, Isa isa) {
  run_append(*task, 0, 0, isa);
}

void auto_gptq_cpu_decode_attend(const DecodeAttention* task,
                                 int64_t begin,
                                 int64_t end,
                                 Isa isa) {
  run_attend(*task, begin, end, isa);
}
