// y = x W^T for up to 16 rows of x, bound by reading the weight.
//
// A block owns 16 * RW outputs, and its warps share out the inputs.  A warp copies its tiles, their
// scales and x into a ring of its own in shared memory, many tiles ahead; of weights the first ones
// before the previous kernel has ended, because they do not depend on it.  Codes go to tensor cores
// as raw numbers, unit * code + base; sums of x, which a product with ones gives, then take out
// base and zero point, so that both cost nothing per weight.  Sums are of whole numbers times x;
// scales come in once per group, in fp32.  Small weights are bound by instructions instead.
#pragma once

#include <cuda_runtime.h>

#include "q_small_ring.cuh"

namespace auto_gptq {

// STAGES: units in the ring.
template <int BITS, typename T, int NT, int RW, int WN, int STAGES, Unit UNIT, Activations X>
struct SmallKernel : SmallRing<BITS, T, NT, RW, WN, UNIT, X> {
  using Ring = SmallRing<BITS, T, NT, RW, WN, UNIT, X>;
  using typename Ring::Operands, typename Ring::Source, typename Ring::SumsOfX;
  using Ring::kTiles, Ring::kGrids, Ring::kStepsOfGrid, Ring::kRun, Ring::kTileBytes;
  using Ring::p, Ring::lane, Ring::ring, Ring::bytes, Ring::grid_at, Ring::scale_log;
  using Ring::Ring, Ring::own_rows, Ring::put, Ring::source, Ring::widen_scale, Ring::read_x;
  using Ring::copy_weight, Ring::copy_x, Ring::copy_perm, Ring::keep_x, Ring::sort_x;
  // Sums that do not wait for each other: faster where x comes late, or codes are long.
  static constexpr bool kWaits = X != kRegisters || (BITS == 8 && RW == 4);
  static constexpr int kParts = NT == 1 && kWaits ? kTiles : 1;

  using Sums = float[kParts][RW][NT][4];

  template <bool ZEROS>
  __device__ __forceinline__ void fold_with(float (&total)[RW][NT][4],
                                            const Sums& sum,
                                            const SumsOfX& sums_of_x,
                                            const char* stage,
                                            int grid) const {
    const char* scales = stage + grid_at;
    const char* zeros = scales + (kGrids * 16 * RW << scale_log());
    float of_x[NT][2], scale[RW][2], taken[RW][2];
    own_rows(of_x, sums_of_x);
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (grid * RW + r) * 16 + h * 8 + lane / 4;
        const int zero = ZEROS ? reinterpret_cast<const uint8_t*>(zeros)[at] : 1 << (BITS - 1);
        scale[r][h] = widen_scale(scales, at);
        taken[r][h] = -(Raw<BITS, T>::base() + Raw<BITS, T>::unit(h) * zero);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (NT == 1 && i == 1 && p.m == 1) {
        break;  // nobody writes it
      }
#pragma unroll
      for (int r = 0; r < RW; ++r) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          float all[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            all[h] = sum[0][r][t][2 * h + i];
            if (kParts == 2) {
              all[h] += sum[kParts - 1][r][t][2 * h + i];
            }
          }
          if (Raw<BITS, T>::kNests) {
            all[0] -= all[1];
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            total[r][t][2 * h + i] += scale[r][h] * (all[h] + taken[r][h] * of_x[t][i]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void fold(float (&total)[RW][NT][4],
                                       const Sums& sum,
                                       const SumsOfX& sums_of_x,
                                       const char* stage,
                                       int grid) const {
    if (p.zeros) {
      fold_with<true>(total, sum, sums_of_x, stage, grid);
    } else {
      fold_with<false>(total, sum, sums_of_x, stage, grid);
    }
  }

  __device__ __forceinline__ void multiply(float (&total)[RW][NT][4],
                                           Sums& sum,
                                           SumsOfX& sums_of_x,
                                           const Operands& b,
                                           const char* stage,
                                           int tile) const {
    const int part = kParts == 2 ? tile : 0;
#pragma unroll
    for (int grid = 0; grid < kGrids; ++grid) {
      Ring::template add_x<kStepsOfGrid>(sums_of_x, b, grid * kStepsOfGrid);
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        const LaneCodes<BITS> codes = read_codes<BITS>(stage + kTileBytes * tile, r, RW, lane);
#pragma unroll
        for (int s = grid * kStepsOfGrid; s < (grid + 1) * kStepsOfGrid; ++s) {
          uint32_t a[4];
          Raw<BITS, T>::nested(codes, s, a);
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(sum[part][r][t], a, b[t][2 * s], b[t][2 * s + 1]);
          }
        }
      }
      if (kGrids > 1) {
        fold(total, sum, sums_of_x, stage, grid);
        clear(sum, sums_of_x);
      }
    }
  }

  __device__ __forceinline__ static void clear(Sums& sum, SumsOfX& sums_of_x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums_of_x[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < kParts * RW * NT * 4; ++i) {
      (&sum[0][0][0][0])[i] = 0;
    }
  }

  __device__ __forceinline__ void load_unit(Operands (&x)[kTiles], int unit, int last) const {
    if (unit < last) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Ring::template load_x<kRun>(x[tile], unit * kTiles + tile);
      }
    }
  }

  __device__ __forceinline__ static void take(Operands (&x)[kTiles], const Operands (&next)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles * NT * 8; ++i) {
      (&x[0][0][0])[i] = (&next[0][0][0])[i];
    }
  }

  // Multiply by the units [first, last) and leave this warp's part of the sums in its memory.
  __device__ __forceinline__ void run_warp(int first, int last) const {
    let_next_kernel_start();
    Source from = source(first);
    const uint32_t begin = shared_address(ring), end = begin + STAGES * bytes;
#pragma unroll 1  // ptxas 13.0 loses the policy otherwise
    for (int i = 0; i < STAGES; ++i) {
      if (first + i < last) {
        if constexpr (X == kByPerm) {
          copy_perm(first + i, begin + i * bytes);
        }
        copy_weight(from, first + i, begin + i * bytes);
      }
      end_group();
    }
    Operands held[kTiles];
    wait_for_previous_kernel();
    if constexpr (X == kByPerm) {
      keep_x();
    } else if constexpr (X == kRegisters) {
      load_unit(held, first, last);
    } else {
#pragma unroll 1
      for (int i = 0; i < STAGES; ++i) {
        if (first + i < last) {
          copy_x(from, begin + i * bytes);
        }
        end_group();
      }
    }
    float total[RW][NT][4] = {};
    uint32_t slot = begin;
    char* stage = ring;
#pragma unroll 1
    for (int unit = first; unit < last; ++unit) {
      // Groups end in the order of units, those of weights before those of x: what is under way
      // after this belongs to the next STAGES - 1 units.
      wait_for_groups<STAGES - 1>();
      __syncwarp();
      if constexpr (X == kByPerm) {
        sort_x(unit, stage);
      }
      Sums sum = {};
      SumsOfX sums_of_x = {};
      Operands next[kTiles];
      if constexpr (X == kRegisters && NT == 1) {  // there are registers for two units
        load_unit(next, unit + 1, last);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (X != kRegisters) {
          read_x(held[tile], stage, tile);
        }
        multiply(total, sum, sums_of_x, held[tile], stage, tile);
        if constexpr (X == kRegisters && NT == 2) {
          if (unit + 1 < last) {
            Ring::template load_x<kRun>(held[tile], (unit + 1) * kTiles + tile);
          }
        }
      }
      if constexpr (X == kRegisters && NT == 1) {
        take(held, next);
      }
      if constexpr (kGrids == 1) {
        fold(total, sum, sums_of_x, stage, 0);
      }
      __syncwarp();
      if (unit + STAGES < last) {
        copy_weight(from, unit + STAGES, slot);
        if constexpr (X == kRing) {
          copy_x(from, slot);
        } else if constexpr (X == kByPerm) {
          copy_perm(unit + STAGES, slot);
        }
      }
      end_group();
      slot += bytes;
      stage += bytes;
      if (slot == end) {
        slot = begin;
        stage = ring;
      }
    }
    wait_for_groups<0>();
    __syncwarp();
    put(total);
  }
};

template <int BITS, typename T, int NT, int RW, int WN, int STAGES, Unit UNIT, Activations X>
__global__ void __launch_bounds__(512) q_small(const __grid_constant__ Small task) {
  extern __shared__ __align__(16) char memory[];
  const SmallKernel<BITS, T, NT, RW, WN, STAGES, UNIT, X> kernel(task, memory);
  const int parts = blockDim.x / (32 * WN);
  kernel.run_warp(task.units * kernel.part / parts, task.units * (kernel.part + 1) / parts);
  __syncthreads();
  kernel.write();
}

}  // namespace auto_gptq
