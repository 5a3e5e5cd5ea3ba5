// The two inner loops of the solver: the choice of a grid, and the GPTQ column loop.
//
// Rows of the weight (outputs) do not touch each other, so a thread takes a strip of them through
// all columns: the strip stays in the first-level cache and no thread waits for
// another.
#include <algorithm>
#include <cmath>

#include "../packed.h"

namespace auto_gptq {
namespace {

constexpr int64_t kStrip = 64;  // outputs per strip: 128 columns of them are 32 KB

struct Strip {
  int64_t n;      // first output
  int64_t width;  // number of outputs, at most kStrip
};

// Round a weight to its code, as torch does: half to even.
AUTO_GPTQ_INLINE float to_code(float weight, float scale, float zero, float maxq) {
  return std::min(std::max(std::nearbyint(weight / scale) + zero, 0.0f), maxq);
}

AUTO_GPTQ_INLINE void choose_strip(const Choice& choice, Strip strip) {
  const float maxq = static_cast<float>(choice.maxq);
  float least[kStrip];
  for (int64_t f = 0; f < choice.candidates; ++f) {
    const float* scale = choice.scales + f * choice.n + strip.n;
    const float* zero = choice.zeros + f * choice.n + strip.n;
    float error[kStrip] = {};
    for (int64_t i = 0; i < choice.columns; ++i) {
      const float* column = choice.weight + i * choice.weight_stride + strip.n;
      const float importance = choice.importance[i];
      for (int64_t c = 0; c < strip.width; ++c) {
        const float code = to_code(column[c], scale[c], zero[c], maxq);
        const float missed = column[c] - (code - zero[c]) * scale[c];
        error[c] += importance * (missed * missed);
      }
    }
    for (int64_t c = 0; c < strip.width; ++c) {
      if (f == 0 || error[c] < least[c]) {
        least[c] = error[c];
        choice.best[strip.n + c] = f;
      }
    }
  }
}

AUTO_GPTQ_INLINE void solve_strip(const Block& block, Strip strip) {
  const int64_t n = strip.n, width = strip.width;
  const float maxq = static_cast<float>(block.maxq);
  for (int64_t i = 0; i < block.columns; ++i) {
    const float* column = block.weight + i * block.weight_stride + n;
    const float* scale = block.scales + block.group[i] * block.n + n;
    const float* zero = block.zeros + block.group[i] * block.n + n;
    const float* factor = block.inverse + i * block.inverse_stride;
    uint8_t* codes = block.codes + i * block.n + n;
    float* errors = block.errors + i * block.n + n;
    for (int64_t c = 0; c < width; ++c) {
      const float kept = to_code(column[c], scale[c], zero[c], maxq);
      codes[c] = static_cast<uint8_t>(kept);
      errors[c] = (column[c] - (kept - zero[c]) * scale[c]) / factor[i];
    }
    for (int64_t j = i + 1; j < block.columns; ++j) {
      float* later = block.weight + j * block.weight_stride + n;
      const float share = factor[j];
      for (int64_t c = 0; c < width; ++c) {
        later[c] -= share * errors[c];
      }
    }
  }
}

// Take every strip of [n_begin, n_end); the full ones have a constant width for the compiler.
#define AUTO_GPTQ_FOR_STRIPS(work, task)                 \
  int64_t n = n_begin;                                   \
  for (; n + kStrip <= n_end; n += kStrip) {             \
    work(task, {n, kStrip});                             \
  }                                                      \
  if (n < n_end) {                                       \
    work(task, {n, n_end - n});                          \
  }

void choose_portable(const Choice& choice, int64_t n_begin, int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(choose_strip, choice)
}

void solve_portable(const Block& block, int64_t n_begin, int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(solve_strip, block)
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void choose_avx2(const Choice& choice,
                                                     int64_t n_begin,
                                                     int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(choose_strip, choice)
}

__attribute__((target("avx2,fma"))) void solve_avx2(const Block& block,
                                                    int64_t n_begin,
                                                    int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(solve_strip, block)
}
#endif

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

void auto_gptq_cpu_choose_grid(const Choice* choice, int64_t n_begin, int64_t n_end, Isa isa) {
#ifdef __x86_64__
  if (isa >= kAvx2) return choose_avx2(*choice, n_begin, n_end);
#endif
  choose_portable(*choice, n_begin, n_end);
}

void auto_gptq_cpu_solve_columns(const Block* block, int64_t n_begin, int64_t n_end, Isa isa) {
#ifdef __x86_64__
  if (isa >= kAvx2) return solve_avx2(*block, n_begin, n_end);
#endif
  solve_portable(*block, n_begin, n_end);
}
