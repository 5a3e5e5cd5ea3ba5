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

// Store a warp's sums of 16 outputs for 16 rows of x, in whole vectors: `first` and `second` are
// what store_sums takes for eight rows each.
template <typename T>
__device__ __forceinline__ void store_sixteen_rows(
    const Product& p, int row, int output, float4 first, float4 second) {
  const int lane = threadIdx.x % 32, n = static_cast<int>(p.weight.n);
  if (output >= n) {  // N is a multiple of 32
    return;
  }
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + output + lane / 4;
    const float low = static_cast<float>(bias[0]), high = static_cast<float>(bias[8]);
    first = make_float4(first.x + low, first.y + low, first.z + high, first.w + high);
    second = make_float4(second.x + low, second.y + low, second.z + high, second.w + high);
  }
  // Of four 8 x 8 matrices a lane has two outputs of row lane / 4; it gets all eight of one.
  const uint32_t m[4] = {
      transpose(pack<T>(first.x, first.y)), transpose(pack<T>(first.z, first.w)),
      transpose(pack<T>(second.x, second.y)), transpose(pack<T>(second.z, second.w))};
  const bool high = lane & 2, odd = lane & 1;
  uint32_t v[2][2];  // of two matrices, the pair of this lane or the one before, and two further
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffff, high ? m[i] : m[2 + i], 2);
    const uint32_t own = high ? m[2 + i] : m[i];
    v[i][0] = high ? got : own;
    v[i][1] = high ? own : got;
  }
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffff, odd ? v[0][i] : v[1][i], 1);
    const uint32_t own = odd ? v[1][i] : v[0][i];
    pair[2 * i] = odd ? got : own;
    pair[2 * i + 1] = odd ? own : got;
  }
  const int at = row + lane / 4 + (high ? 8 : 0);
  if (at < p.m) {
    *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + int64_t{at} * n + output + (odd ? 8 : 0)) =
        make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
}

}  // namespace auto_gptq
