// Up to 8 or 16 rows of an expert at a time, bound by reading the weights of the experts hit.
//
// A warp computes 32 outputs for a part of one expert's rows.  NW warps of a block stand side by side,
// the others share out the inputs: where there are many blocks, few of them that do more cost less.
// Codes and scales go from memory into registers a unit of inputs ahead, x when needed.  As in q_small.cuh,
// codes go to tensor cores as raw numbers, and sums of x take out base and zero point.
#pragma once

#include "experts.cuh"

namespace auto_gptq {

constexpr int kFewOutputs = 32;  // of a warp
constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;

// NT: 8 rows of x each.  TILES of 64 inputs that share a scale, or one whose SPANS have their own.
template <int BITS, typename T, int NT, int TILES, int SPANS>
struct Few {
  static constexpr int RW = kFewOutputs / 16;

  // What a lane holds of a unit before it is needed.
  struct Held {
    LaneCodes<BITS> codes[TILES][RW];
    uint32_t scale[SPANS][RW][2];
    uint32_t zero[SPANS][RW][2];
  };

  const Grouped& p;
  const int lane = threadIdx.x % 32;
  const uint32_t* tiles;  // of the expert, from this block's outputs on
  int64_t grid;           // of group 0, of this lane's first output
  int row_tile;
  const T* x[NT];

  __device__ Few(const Grouped& task, Part part, int output) : p(task), row_tile(output % kSide / 16) {
    tiles = p.tiles + part.expert * p.tile_words +
            static_cast<int64_t>(output / kSide) * p.k_tiles * (128 * BITS);
    grid = part.expert * p.grids + output + lane / 4;
#pragma unroll
    for (int t = 0; t < NT; ++t) {  // rows beyond the last only reach columns that nobody writes
      const int row = part.first + min(8 * t + lane / 4, part.count - 1);
      x[t] = static_cast<const T*>(p.x) + static_cast<int64_t>(p.rows ? p.rows[row] : row) * p.k;
    }
  }

  __device__ __forceinline__ void hold(Held& h, int unit) const {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const uint32_t* tile = tiles + static_cast<int64_t>(TILES * unit + t) * (128 * BITS);
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        h.codes[t][r] = load_codes<BITS>(tile, row_tile + r, lane);
      }
    }
#pragma unroll
    for (int s = 0; s < SPANS; ++s) {
      const int run = SPANS == 1 ? TILES * unit : (unit * kSide + place_of(s, 0, p.run)) / p.run;
      const int64_t at = grid + static_cast<int64_t>(group_of(p, run)) * p.n_pad;
#pragma unroll
      for (int r = 0; r < RW; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          h.scale[s][r][i] = scale_bits(p, at + 16 * r + 8 * i);
          h.zero[s][r][i] = p.zeros ? p.zeros[at + 16 * r + 8 * i] : 1 << (BITS - 1);
        }
      }
    }
  }

  // The B operands of a tile's four steps.
  __device__ __forceinline__ void read_x(uint32_t (&b)[NT][8], int tile) const {
    const int q = lane % 4;
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      if constexpr (SPANS == 1) {
        const int at = tile * kSide + 16 * q;
        uint4 u{}, v{};
        if (at < p.k) {
          u = reinterpret_cast<const uint4*>(x[t] + at)[0];
          v = reinterpret_cast<const uint4*>(x[t] + at)[1];
        }
        b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
        b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
      } else {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int at = tile * kSide + place_of(s, q, p.run);
          const uint2 u = at < p.k ? *reinterpret_cast<const uint2*>(x[t] + at) : uint2{};
          b[t][2 * s] = u.x, b[t][2 * s + 1] = u.y;
        }
      }
    }
  }

  __device__ __forceinline__ void fold(float (&total)[RW][NT][4],
                                       const float (&sum)[RW][NT][4],
                                       const float (&ones)[NT][4],
                                       const Held& h,
                                       int span) const {
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale = widen_scale(p, h.scale[span][r][i]);
        const float taken = -(Raw<BITS, T>::base() + Raw<BITS, T>::unit(i) *
                                                         static_cast<float>(h.zero[span][r][i]));
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            total[r][t][2 * i + c] += scale * (sum[r][t][2 * i + c] + taken * ones[t][c]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&total)[RW][NT][4], const Held& h, int unit) const {
    const uint32_t one = Pairs<T>::constant(1.0f), all_ones[4] = {one, one, one, one};
    float sum[RW][NT][4] = {}, ones[NT][4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      uint32_t b[NT][8];
      read_x(b, TILES * unit + tile);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (SPANS > 1 && s > 0) {
          fold(total, sum, ones, h, s - 1);
          memset(sum, 0, sizeof(sum));
          memset(ones, 0, sizeof(ones));
        }
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
    fold(total, sum, ones, h, SPANS - 1);
  }
};

template <int BITS, typename T, int NT, int NW, int TILES, int SPANS>
__global__ void __launch_bounds__(kFewThreads, NT == 1 ? 3 : 2)
    experts_few(const __grid_constant__ Grouped p) {
  using Kernel = Few<BITS, T, NT, TILES, SPANS>;
  constexpr int RW = Kernel::RW, KW = kFewWarps / NW, kOutputs = NW * kFewOutputs;
  __shared__ float4 sums[KW][NW][RW * NT][32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  // Neighbours take the same outputs: where an expert has several parts, they share its weight.
  const Part part = find_part(p, 8 * NT, blockIdx.x % p.parts);
  const int block_output = blockIdx.x / p.parts * kOutputs;
  if (part.count == 0) {
    return;
  }
  if (part.expert == p.experts) {
    clear_rows<T>(p, part, block_output, kOutputs);
    return;
  }
  const int lane = threadIdx.x % 32, wn = threadIdx.x / 32 % NW, wk = threadIdx.x / 32 / NW;
  const int output = block_output + wn * kFewOutputs;
  if (output < p.n_pad) {
    const Kernel kernel(p, part, output);
    const int units = p.k_tiles / TILES;
    const int first = units * wk / KW, last = units * (wk + 1) / KW;
    float total[RW][NT][4] = {};
    typename Kernel::Held held;
    if (first < last) {
      kernel.hold(held, first);
    }
#pragma unroll 1
    for (int unit = first; unit < last; ++unit) {
      kernel.multiply(total, held, unit);
      if (unit + 1 < last) {
        kernel.hold(held, unit + 1);
      }
    }
    const float upper = 1.0f / Raw<BITS, T>::unit(0), lower = 1.0f / Raw<BITS, T>::unit(1);
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const float* v = total[r][t];
        sums[wk][wn][r * NT + t][lane] =
            make_float4(v[0] * upper, v[1] * upper, v[2] * lower, v[3] * lower);
      }
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kOutputs * part.count; e += kFewThreads) {
    const int out = e % kOutputs, m = e / kOutputs, row = out % 16, n = block_output + out;
    const int fragment = out % kFewOutputs / 16 * NT + m / 8, from = row % 8 * 4 + m % 8 / 2;
    if (n >= p.n) {
      continue;
    }
    float value = 0;
#pragma unroll
    for (int w = 0; w < KW; ++w) {
      const float4& four = sums[w][out / kFewOutputs][fragment][from];
      value += reinterpret_cast<const float*>(&four)[row / 8 * 2 + m % 2];
    }
    if (p.bias) {
      value += static_cast<float>(
          static_cast<const T*>(p.bias)[static_cast<int64_t>(part.expert) * p.n + n]);
    }
    static_cast<T*>(p.y)[static_cast<int64_t>(part.first + m) * p.n + n] = narrow<T>(value);
  }
}

template <int BITS, typename T, int NT, int NW>
const char* start_few(const Experts& task, cudaStream_t stream) {
  constexpr int kOutputs = NW * kFewOutputs;
  const Grouped made = describe(task, 8 * NT);
  const dim3 blocks(static_cast<unsigned>((made.n_pad + kOutputs - 1) / kOutputs * made.parts));
  const auto go = [&](auto kernel) { return launch(kernel, made, blocks, kFewThreads, 0, stream); };
  if (made.run != kSide) {
    return go(experts_few<BITS, T, NT, NW, 1, 4>);
  }
  const bool paired = made.k_tiles % 2 == 0 && task.weight.group_size % (2 * kSide) == 0;
  return paired ? go(experts_few<BITS, T, NT, NW, 2, 1>)
                : go(experts_few<BITS, T, NT, NW, 1, 1>);
}

}  // namespace auto_gptq
