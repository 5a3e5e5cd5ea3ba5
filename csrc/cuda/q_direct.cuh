// y = x W^T for 9 to 16 rows of x where two tiles always share a scale.
//
// As q_small.cuh, but codes and x go from global memory into registers: with twice the products per
// code there is time enough for that, and x of 16 rows would fill shared memory.
#pragma once

#include "q_small.cuh"

namespace auto_gptq {

// What a lane holds of a unit before it is needed.
template <int BITS, int RW>
struct Held {
  LaneCodes<BITS> codes[2][RW];
  uint32_t scale[RW][2];  // bits of 16-bit scales
  uint32_t zero[RW][2];
};

// AHEAD: units that are held in registers.
template <int BITS, typename T, int RW, int AHEAD, int THREADS>
__global__ void __launch_bounds__(THREADS) q_direct(const __grid_constant__ Small task) {
  constexpr int NT = 2;
  using Kernel = SmallKernel<BITS, T, NT, RW, 2, kPair>;
  extern __shared__ __align__(16) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = THREADS / 32;
  const Kernel kernel(task, memory, warp);
  const int first = task.units * warp / warps, last = task.units * (warp + 1) / warps;
  const int row = kernel.first_row + lane / 4;
  const uint32_t* tiles =
      task.tiles + static_cast<int64_t>(kernel.first_row / kSide) * task.k_tiles * (128 * BITS);
  Held<BITS, RW> held[AHEAD];
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
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (first + i < last) {
      hold(held[i], first + i);
    }
  }
  wait_for_previous_kernel();
  const T* x[NT];  // rows beyond M only reach columns that nobody writes
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    const int64_t of = min(8 * t + lane / 4, task.m - 1);
    x[t] = static_cast<const T*>(task.x) + of * task.k + lane % 4 * 16;
  }
  const uint32_t one = Pairs<T>::constant(1.0f), all_ones[4] = {one, one, one, one};
  float total[RW][NT][4] = {};
#pragma unroll 1
  for (int base = first; base < last; base += AHEAD) {
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ++ahead) {
      const int unit = base + ahead;
      if (unit >= last) {
        break;
      }
      Held<BITS, RW>& h = held[ahead];
      float sum[RW][NT][4] = {}, ones[NT][4] = {};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t b[NT][8];
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const uint4* from = reinterpret_cast<const uint4*>(x[t] + unit * 128 + tile * 64);
          const uint4 u = from[0], v = from[1];
          b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
          b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(ones[t], all_ones, b[t][2 * s], b[t][2 * s + 1]);
          }
#pragma unroll
          for (int r = 0; r < RW; ++r) {
            uint32_t a[4];
            Raw<BITS, T>::operand(h.codes[tile][r], s, a);
#pragma unroll
            for (int t = 0; t < NT; ++t) {
              mma<T>(sum[r][t], a, b[t][2 * s], b[t][2 * s + 1]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < RW; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale = task.scale_type == kFloat16
                                  ? __half2float(__ushort_as_half(h.scale[r][i]))
                                  : __uint_as_float(h.scale[r][i] << 16);
          const float taken = -(Raw<BITS, T>::base() +
                                Raw<BITS, T>::unit(i) * static_cast<float>(h.zero[r][i]));
#pragma unroll
          for (int t = 0; t < NT; ++t) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              total[r][t][2 * i + c] += scale * (sum[r][t][2 * i + c] + taken * ones[t][c]);
            }
          }
        }
      }
      if (unit + AHEAD < last) {
        hold(h, unit + AHEAD);
      }
    }
  }
  kernel.put(total);
  __syncthreads();
  kernel.write(memory, warps);
}

template <int BITS, typename T, int RW, int AHEAD, int THREADS>
const char* start_direct(const Product& product, cudaStream_t stream) {
  Small task = describe(product);
  task.units = task.k_tiles / 2;
  set_groups(task, product.weight.group_size / 128);
  task.warp_bytes = RW * 2 * 512;
  return launch(q_direct<BITS, T, RW, AHEAD, THREADS>, task, task.scale_stride / (16 * RW), THREADS,
                THREADS / 32 * task.warp_bytes, stream);
}

// Whole pairs of tiles with one 16-bit scale per output.
inline bool fits_direct(const Product& product) {
  const Tiled& weight = product.weight;
  return product.m > 8 && weight.scale_type != kFloat32 && weight.k % 128 == 0 &&
         weight.group_size % 128 == 0;
}

template <int BITS, typename T>
const char* start_direct(const Product& product, cudaStream_t stream) {
  if (product.weight.n > 8192) {
    return start_direct<BITS, T, 4, 1, 256>(product, stream);
  }
  return product.weight.n > 4096 ? start_direct<BITS, T, 2, 2, 256>(product, stream)
                                 : start_direct<BITS, T, 2, 1, 512>(product, stream);
}

}  // namespace auto_gptq
