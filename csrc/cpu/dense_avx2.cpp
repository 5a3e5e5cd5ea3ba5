// x W^T of a few rows of x and a dense weight, which is read once, in the order in which it lies.
#ifdef __x86_64__
#include <immintrin.h>

#include <algorithm>

#include "../decode.h"

#pragma GCC target("avx2,fma,f16c")
#include "../packed.h"

namespace auto_gptq {
namespace {

constexpr int64_t kOutputs = 16;  // that several rows of x take turns with, in the cache

AUTO_GPTQ_INLINE Floats<8> widen(const float* from) { return load<Floats<8>>(from); }
AUTO_GPTQ_INLINE Floats<8> widen(const _Float16* from) {
  return (Floats<8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
AUTO_GPTQ_INLINE Floats<8> widen(const uint16_t* from) {  // bfloat16
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Floats<8>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

AUTO_GPTQ_INLINE float sum(Floats<8> v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// M rows of x times one row of the weight.
template <typename T, int M>
AUTO_GPTQ_INLINE void multiply_row(const Dense& task, const T* weight, int64_t m, int64_t n) {
  constexpr int kSums = M == 1 ? 4 : 1;  // side by side, as a sum waits for the one before
  const float* x = task.x + m * task.k;
  Floats<8> sums[M][kSums] = {};
  int64_t k = 0;
  for (; k + 8 * kSums <= task.k; k += 8 * kSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const Floats<8> own = widen(weight + k + 8 * i);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
        sums[r][i] += own * load<Floats<8>>(x + r * task.k + k + 8 * i);
      }
    }
  }
  for (; k < task.k; k += 8) {
    const Floats<8> own = widen(weight + k);
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      sums[r][0] += own * load<Floats<8>>(x + r * task.k + k);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int i = 1; i < kSums; ++i) {
      sums[r][0] += sums[r][i];
    }
    task.y[(m + r) * task.n + n] = sum(sums[r][0]);
  }
}

template <typename T>
void multiply_dense(const Dense& task, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  for (int64_t first = begin; first < end; first += kOutputs) {
    const int64_t stop = std::min(first + kOutputs, end);
    int64_t m = 0;
    for (; m + 4 <= task.m; m += 4) {
      for (int64_t n = first; n < stop; ++n) {
        multiply_row<T, 4>(task, weight + n * task.k, m, n);
      }
    }
    for (; m < task.m; ++m) {
      for (int64_t n = first; n < stop; ++n) {
        multiply_row<T, 1>(task, weight + n * task.k, m, n);
      }
    }
  }
}

}  // namespace
}  // namespace auto_gptq

void auto_gptq_cpu_multiply_dense(const auto_gptq::Dense* task, int64_t begin, int64_t end) {
  using namespace auto_gptq;
  if (task->type == kFloat32) return multiply_dense<float>(*task, begin, end);
  if (task->type == kFloat16) return multiply_dense<_Float16>(*task, begin, end);
  return multiply_dense<uint16_t>(*task, begin, end);
}
#endif
