// The two inner loops of the solver: fitting grids to groups, and the GPTQ column loop.
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

// Round a scale to the dtype of the checkpoint; 0 becomes 1, so that nobody divides by it.
AUTO_GPTQ_INLINE float storable(float scale, DataType type) {
  if (!(scale > 0)) {
    return 1.0f;
  }
  if (type == kFloat32) {
    return std::min(std::max(scale, 0x1p-149f), 0x1.fffffep127f);
  }
  if (type == kBFloat16) {
    uint32_t bits;
    const float kept = std::min(std::max(scale, 0x1p-133f), 0x1.fep127f);
    std::memcpy(&bits, &kept, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    float rounded;
    std::memcpy(&rounded, &bits, 4);
    return rounded;
  }
  // Adding and taking away a number whose last place is that of the half rounds to it.
  const float kept = std::min(std::max(scale, 0x1p-24f), 65504.0f);
  uint32_t bits;
  std::memcpy(&bits, &kept, 4);
  const uint32_t exponent = std::max(bits & 0x7f800000u, 113u << 23);  // of at least 2^-14
  const uint32_t anchor_bits = exponent + (13u << 23);
  float anchor;
  std::memcpy(&anchor, &anchor_bits, 4);
  return (kept + anchor) - anchor;
}

// Round a weight to its code, as torch does: half to even.
AUTO_GPTQ_INLINE float to_code(float weight, float scale, float zero, float maxq) {
  return std::min(std::max(std::nearbyint(weight / scale) + zero, 0.0f), maxq);
}

// The grid over a share of [least, most], a range that includes 0; a negative share mirrors it
// and gives a negative scale.  formats/grid.py says the same in Python.
AUTO_GPTQ_INLINE void span(
    const Fit& fit, float least, float most, float factor, float* scale, float* zero) {
  const float maxq = static_cast<float>((1 << fit.bits) - 1);
  const float lowest = std::min(least * factor, most * factor);
  const float highest = std::max(least * factor, most * factor);
  float exact = std::max(-lowest, highest) * (2 / maxq);
  if (!fit.symmetric) {
    exact = std::max((highest - lowest) / maxq, highest / (maxq - fit.lowest_zero));
  }
  *scale = storable(exact, fit.scale_type);
  *zero = (maxq + 1) / 2;
  if (!fit.symmetric) {
    const float low = static_cast<float>(fit.lowest_zero);
    *zero = std::min(std::max(std::nearbyint(-lowest / *scale), low), maxq);
  }
  *scale = factor > 0 ? *scale : -*scale;
}

// Fit columns [first, last), one group, for the outputs of a strip.
AUTO_GPTQ_INLINE void fit_strip(const Fit& fit, int64_t group, Strip strip) {
  const float maxq = static_cast<float>((1 << fit.bits) - 1);
  const int64_t first = group * fit.group_size;
  const int64_t last = std::min(first + fit.group_size, fit.columns);
  const float* weight = fit.weight + strip.n;
  float lowest[kStrip] = {}, highest[kStrip] = {};
  for (int64_t i = first; i < last; ++i) {
    for (int64_t c = 0; c < strip.width; ++c) {
      lowest[c] = std::min(lowest[c], weight[i * fit.weight_stride + c]);
      highest[c] = std::max(highest[c], weight[i * fit.weight_stride + c]);
    }
  }
  float* best_scale = fit.scales + group * fit.n + strip.n;
  float* best_zero = fit.zeros + group * fit.n + strip.n;
  float least[kStrip];
  for (int64_t f = 0; f < fit.candidates; ++f) {
    float scale[kStrip], zero[kStrip], error[kStrip] = {};
    for (int64_t c = 0; c < strip.width; ++c) {
      span(fit, lowest[c], highest[c], fit.factors[f], scale + c, zero + c);
    }
    for (int64_t i = first; i < last; ++i) {
      const float* column = weight + i * fit.weight_stride;
      const float importance = fit.importance[i];
      for (int64_t c = 0; c < strip.width; ++c) {
        const float code = to_code(column[c], scale[c], zero[c], maxq);
        const float missed = column[c] - (code - zero[c]) * scale[c];
        error[c] += importance * (missed * missed);
      }
    }
    for (int64_t c = 0; c < strip.width; ++c) {
      if (f == 0 || error[c] < least[c]) {
        least[c] = error[c];
        best_scale[c] = scale[c];
        best_zero[c] = zero[c];
      }
    }
  }
}

AUTO_GPTQ_INLINE void fit_strips(const Fit& fit, Strip strip) {
  for (int64_t group = 0; group * fit.group_size < fit.columns; ++group) {
    fit_strip(fit, group, strip);
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

void fit_portable(const Fit& fit, int64_t n_begin, int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(fit_strips, fit)
}

void solve_portable(const Block& block, int64_t n_begin, int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(solve_strip, block)
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void fit_avx2(const Fit& fit,
                                                  int64_t n_begin,
                                                  int64_t n_end) {
  AUTO_GPTQ_FOR_STRIPS(fit_strips, fit)
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

void auto_gptq_cpu_fit_grids(const Fit* fit, int64_t n_begin, int64_t n_end, Isa isa) {
#ifdef __x86_64__
  if (isa >= kAvx2) return fit_avx2(*fit, n_begin, n_end);
#endif
  fit_portable(*fit, n_begin, n_end);
}

void auto_gptq_cpu_solve_columns(const Block* block, int64_t n_begin, int64_t n_end, Isa isa) {
#ifdef __x86_64__
  if (isa >= kAvx2) return solve_avx2(*block, n_begin, n_end);
#endif
  solve_portable(*block, n_begin, n_end);
}
