// Grids over ranges of weights, as both kernels of the solver fit them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../launch.h"

namespace auto_gptq {

// The nearest whole number, half to even, in a third of the time that rintf takes; where x is too
// large for it, so is the result, and the code is cut off.
__device__ inline float round_to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Round a scale to the dtype of the checkpoint; 0 becomes 1, so that nobody divides by it.
__device__ inline float storable(float scale, int type) {
  if (!(scale > 0.0f)) return 1.0f;
  if (type == kFloat16) {
    return __half2float(__float2half_rn(fminf(fmaxf(scale, 0x1p-24f), 65504.0f)));
  }
  if (type == kBFloat16) {
    return __bfloat162float(__float2bfloat16_rn(fminf(fmaxf(scale, 0x1p-133f), 0x1.fep127f)));
  }
  return fminf(fmaxf(scale, 0x1p-149f), 0x1.fffffep127f);
}

// The grid over a share of [least, most], a range that includes 0; a negative share mirrors it and
// gives a negative scale.  formats/grid.py says the same in Python.
__device__ inline void span(
    const Fit& fit, float least, float most, float factor, float& scale, float& zero) {
  const float maxq = static_cast<float>((1 << fit.bits) - 1);
  const float lowest = fminf(least * factor, most * factor);
  const float highest = fmaxf(least * factor, most * factor);
  if (fit.symmetric) {
    scale = storable(fmaxf(-lowest, highest) * (2.0f / maxq), fit.scale_type);
    zero = (maxq + 1.0f) / 2.0f;
  } else {
    const float low = static_cast<float>(fit.lowest_zero);
    scale = storable(fmaxf((highest - lowest) / maxq, highest / (maxq - low)), fit.scale_type);
    zero = fminf(fmaxf(rintf(-lowest / scale), low), maxq);
  }
  scale = factor > 0.0f ? scale : -scale;
}

}  // namespace auto_gptq
