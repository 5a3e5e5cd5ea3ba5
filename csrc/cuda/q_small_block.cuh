// What the two kernels for few rows of x share: which outputs and inputs a warp has, x from global
// memory, and what becomes of the warps' sums.
#pragma once

#include <cuda_runtime.h>

#include "mma.cuh"
#include "q_small_task.h"
#include "raw.cuh"

namespace auto_gptq {

// NT: 8 rows of x each.  RW: 16 outputs each, of a warp.  WN: warps with other outputs that share
// inputs.
template <int BITS, typename T, int NT, int RW, int WN>
struct SmallBlock {
  const Small& p;
  const int lane, first_row, part;  // of this warp: its first output, its part of the inputs
  char* const memory;
  char* const ring;  // this warp's part of it

  __device__ SmallBlock(const Small& task, char* shared)
      : p(task),
        lane(threadIdx.x % 32),
        first_row((blockIdx.x * WN + threadIdx.x / 32 % WN) * 16 * RW),
        part(threadIdx.x / (32 * WN)),
        memory(shared),
        ring(shared + threadIdx.x / 32 * task.warp_bytes) {}

  __device__ __forceinline__ int group_of(int run) const {
    return min(static_cast<int>(__umulhi(2 * run + 1, p.group_of_run)), p.groups - 1);
  }

  using Operands = uint32_t[NT][8];  // the B operands of a tile's four steps

  // From global memory.
  __device__ __forceinline__ void load_x(Operands& b, int tile) const {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      const int row = min(8 * t + lane / 4, p.m - 1);
      const T* x = static_cast<const T*>(p.x) + (row * p.k + tile * kSide + lane % 4 * 16);
      const uint4 u = reinterpret_cast<const uint4*>(x)[0],
                  v = reinterpret_cast<const uint4*>(x)[1];
      b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
      b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
    }
  }

  using SumsOfX = float[4];

  // Add x of steps.  A product with ones gives its sums; x is the left side of it, because lanes hold
  // the same of both sides.  The left side has 16 rows: the next step's, where x has only 8.
  template <int STEPS>
  __device__ __forceinline__ static void add_x(SumsOfX& sums, const Operands& b, int first) {
    const uint32_t one = Pairs<T>::constant(1.0f);
    constexpr int kAtOnce = NT == 1 && STEPS > 1 ? 2 : 1;
#pragma unroll
    for (int s = first; s < first + STEPS; s += kAtOnce) {
      uint32_t a[4] = {b[0][2 * s], 0, b[0][2 * s + 1], 0};
      if (NT == 2 || kAtOnce == 2) {
        a[1] = b[NT - 1][2 * (s + kAtOnce - 1)];
        a[3] = b[NT - 1][2 * (s + kAtOnce - 1) + 1];
      }
      mma<T>(sums, a, one, one);
    }
  }

  // The sums of those rows of x that this lane has products of.
  __device__ __forceinline__ void own_rows(float (&of_x)[NT][2], const SumsOfX& sums) const {
    const int from = lane % 4 * 8;  // a row's sum is in four lanes
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      of_x[0][i] = __shfl_sync(~0u, NT == 1 ? sums[0] + sums[2] : sums[0], from + 4 * i);
      if (NT == 2) {
        of_x[NT - 1][i] = __shfl_sync(~0u, sums[2], from + 4 * i);
      }
    }
  }

  // Leave this warp's part of the sums in its memory.
  __device__ __forceinline__ void put(const float (&total)[RW][NT][4]) const {
    float4* mine = reinterpret_cast<float4*>(ring);
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const float* v = total[r][t];
        const float upper = 1.0f / Raw<BITS, T>::unit(0), lower = 1.0f / Raw<BITS, T>::unit(1);
        mine[(r * NT + t) * 32 + lane] =
            make_float4(v[0] * upper, v[1] * upper, v[2] * lower, v[3] * lower);
      }
    }
  }

  // Add up the warps' parts and write the block's outputs.
  __device__ __forceinline__ void write() const {
    constexpr int kOutputs = 16 * RW * WN;
    const int parts = blockDim.x / (32 * WN);
    for (int e = threadIdx.x; e < kOutputs * p.m; e += blockDim.x) {
      const int r = e % kOutputs, m = e / kOutputs, row = r % 16;
      const int fragment = r / 16 % RW * NT + m / 8, from = row % 8 * 4 + m % 8 / 2;
      const int at = (fragment * 32 + from) * 4 + row / 8 * 2 + m % 2;
      float value = 0;
#pragma unroll 4
      for (int i = 0; i < parts; ++i) {
        const char* of_warp = memory + (i * WN + r / (16 * RW)) * p.warp_bytes;
        value += reinterpret_cast<const float*>(of_warp)[at];
      }
      const int n = blockIdx.x * kOutputs + r;
      if (n < p.n) {
        if (p.bias) {
          value += static_cast<float>(static_cast<const T*>(p.bias)[n]);
        }
        static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.n + n] = narrow<T>(value);
      }
    }
  }
};

}  // namespace auto_gptq
