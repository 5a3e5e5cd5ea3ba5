// Sums of tensor cores to rows of y.
#pragma once

#include "../launch.h"
#include "tiles.cuh"

namespace auto_gptq {

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (Pairs<T>::kMantissa == 10) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Store a warp's sums of 16 outputs for eight rows of x: lane l has rows 2 (l % 4) and the next, of
// output l / 4 in x and y of `sums`, and of output l / 4 + 8 in z and w.
template <typename T>
__device__ __forceinline__ void store_sums(const Product& p, int row, int output, float4 sums) {
  const int lane = threadIdx.x % 32, n = static_cast<int>(p.weight.n);
  if (output >= n) {  // N is a multiple of 32
    return;
  }
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + output + lane / 4;
    const float low = static_cast<float>(bias[0]), high = static_cast<float>(bias[8]);
    sums = make_float4(sums.x + low, sums.y + low, sums.z + high, sums.w + high);
  }
  const uint32_t low = transpose(pack<T>(sums.x, sums.y));
  const uint32_t high = transpose(pack<T>(sums.z, sums.w));
  if (row + lane / 4 < p.m) {
    T* to = static_cast<T*>(p.y) + int64_t{row + lane / 4} * n + output + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(to) = low;
    *reinterpret_cast<uint32_t*>(to + 8) = high;
  }
}

}  // namespace auto_gptq
