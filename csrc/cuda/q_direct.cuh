// y = x W^T for 9 to 16 rows of x where two tiles always share a scale.
//
// As q_small.cuh, but codes as well go from global memory straight into registers.
#pragma once

#include "q_small_start.cuh"

namespace auto_gptq {

// What a lane holds of a unit before it is needed.
template <int BITS, int RW>
struct Held {
  LaneCodes<BITS> codes[2][RW];
  uint32_t scale[RW][2];  // bits of 16-bit scales
  uint32_t zero[RW][2];
};

template <int BITS, typename T, int RW>
__global__ void __launch_bounds__(512) q_direct(const __grid_constant__ Small task) {
  constexpr int NT = 2;
  using Kernel = SmallBlock<BITS, T, NT, RW, 1>;
  extern __shared__ __align__(16) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Kernel kernel(task, memory);
  const int first = task.units * warp / warps, last = task.units * (warp + 1) / warps;
  const int row = kernel.first_row + lane / 4;
  const uint32_t* tiles =
      task.tiles + static_cast<int64_t>(kernel.first_row / kSide) * task.k_tiles * (128 * BITS);
  Held<BITS, RW> held;
  const auto hold = [&](Held<BITS, RW>& h, int unit) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint32_t* tile = tiles + static_cast<int64_t>(2 * unit + t) * (128 * BITS);
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        h.codes[t][r] = load_codes<BITS>(tile, kernel.first_row / 16 % 4 + r, lane);
      }
    }
    const int64_t grid = static_cast<int64_t>(kernel.group_of(unit)) * task.scale_stride + row;
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = grid + 16 * r + 8 * i;
        h.scale[r][i] = static_cast<const uint16_t*>(task.scales)[at];
        h.zero[r][i] = task.zeros ? task.zeros[at] : 1 << (BITS - 1);
      }
    }
  };
  let_next_kernel_start();
  if (first < last) {
    hold(held, first);
  }
  wait_for_previous_kernel();
  float total[RW][NT][4] = {};
#pragma unroll 1
  for (int unit = first; unit < last; ++unit) {
    float sum[RW][NT][4] = {}, of_x[NT][2];
    typename Kernel::SumsOfX sums_of_x = {};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t b[NT][8];
      kernel.load_x(b, 2 * unit + tile);
      Kernel::template add_x<4>(sums_of_x, b, 0);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int r = 0; r < RW; ++r) {
          uint32_t a[4];
          Raw<BITS, T>::operand(held.codes[tile][r], s, a);
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(sum[r][t], a, b[t][2 * s], b[t][2 * s + 1]);
          }
        }
      }
    }
    kernel.own_rows(of_x, sums_of_x);
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale = task.scale_type == kFloat16
                                ? __half2float(__ushort_as_half(held.scale[r][i]))
                                : __uint_as_float(held.scale[r][i] << 16);
        const float taken =
            -(Raw<BITS, T>::base() + Raw<BITS, T>::unit(i) * static_cast<float>(held.zero[r][i]));
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            total[r][t][2 * i + c] += scale * (sum[r][t][2 * i + c] + taken * of_x[t][c]);
          }
        }
      }
    }
    if (unit + 1 < last) {
      hold(held, unit + 1);
    }
  }
  kernel.put(total);
  __syncthreads();
  kernel.write();
}

// 32 outputs a block: with 64, or with two units held, a processor has registers for fewer warps,
// which took 1.4 times as long per weight on an H100.
template <int BITS, typename T>
const char* start_direct(const Product& product, SmallConfig config, cudaStream_t stream) {
  constexpr int RW = 2;
  Small task = describe(product);
  task.units = task.k_tiles / 2;
  set_groups(task, product.weight.group_size / 128);
  task.warp_bytes = RW * 2 * 512;
  return launch_small(q_direct<BITS, T, RW>, task, task.scale_stride / (16 * RW), config.warps,
                      config.warps * task.warp_bytes, stream);
}

// Whole pairs of tiles with one 16-bit scale per output.
inline bool fits_direct(const Product& product) {
  const Tiled& weight = product.weight;
  return product.m > 8 && weight.n <= 8192 && weight.scale_type != kFloat32 &&
         weight.k % 128 == 0 && weight.group_size % 128 == 0;
}

}  // namespace auto_gptq
