// y = x W^T for up to 16 rows of x, bound by reading the weight.
//
// A block owns 16 * RW outputs, and its warps share out the inputs.  A warp copies its tiles, their
// scales and x into a ring of its own in shared memory, many tiles ahead; of weights the first ones
// before the previous kernel has ended, because they do not depend on it.  Codes go to tensor cores
// as raw numbers, unit * code + base; sums of x, which a product with ones gives, then take out
// base and zero point, so that both cost nothing per weight.  Sums are of whole numbers times x;
// scales come in once per group, in fp32.
#pragma once

#include <cuda_runtime.h>

#include "../launch.h"
#include "device.h"
#include "mma.cuh"
#include "q_small_task.h"
#include "raw.cuh"
#include "tiles.cuh"

namespace auto_gptq {

// NT: 8 rows of x each.  RW: 16 outputs each, of a warp.  WN: warps with other outputs that share
// inputs.  STAGES: units in the ring.
template <int BITS, typename T, int NT, int RW, int WN, int STAGES, Unit UNIT, Activations X>
struct SmallKernel {
  static constexpr int kTiles = UNIT == kPair ? 2 : 1;  // of a unit
  static constexpr int kGrids = UNIT == kSteps ? 4 : UNIT == kHalves ? 2 : 1;
  static constexpr int kStepsOfGrid = 4 / kGrids;  // where a tile has several
  static constexpr int kTileBytes = RW * 128 * BITS;
  static constexpr int kWeightBytes = kTiles * kTileBytes;
  // Rows of x lie 16 bytes apart modulo 128, so that the 8 rows of a fragment meet no bank twice.
  static constexpr int kPitch = kTiles * 128 + 16;
  static constexpr int kParts = NT == 1 ? kTiles : 1;  // sums that do not wait for each other

  // Shared memory of one stage of one warp: codes, x, scales, zeros.
  __host__ __device__ static int stage_bytes(int m, int scale_bytes, bool zeros) {
    return x_end(m) + kGrids * 16 * RW * (scale_bytes + (zeros ? 1 : 0));
  }
  __host__ __device__ static int x_end(int m) {
    return kWeightBytes + (X == kRing ? m * kPitch : 0);
  }

  const Small& p;
  const int lane, first_row, part;  // of this warp: its first output, its part of the inputs
  char* const memory;
  char* const ring;
  const int bytes, grid_at;  // of a stage, and where its scales begin
  int x_at;                  // where this lane's part of x begins in a stage, or in a unit of all

  __device__ SmallKernel(const Small& task, char* shared)
      : p(task),
        lane(threadIdx.x % 32),
        first_row((blockIdx.x * WN + threadIdx.x / 32 % WN) * 16 * RW),
        part(threadIdx.x / (32 * WN)),
        memory(shared),
        ring(shared + threadIdx.x / 32 * task.warp_bytes),
        bytes(stage_bytes(task.m, task.scale_bytes, task.zeros != nullptr)),
        grid_at(x_end(task.m)) {
    // Rows beyond M only reach columns that nobody writes.
    x_at = (X == kRing ? kWeightBytes : 0) + min(lane / 4, task.m - 1) * pitch() +
           (kGrids > 1 ? 0 : lane % 4 * 32);
  }

  __device__ __forceinline__ int pitch() const { return X == kByPerm ? p.x_pitch : kPitch; }

  // What a lane copies of the next unit, in pieces of 16 bytes: codes, x, and at most one piece of
  // the scales and one of the zeros.
  struct Source {
    const char* codes;
    const char* scales;    // of the unit's group, or of the first if a unit has several
    const uint8_t* zeros;  // likewise
    bool copies_scales, copies_zeros;
    int left;  // units of this group that are still to come
    const T* x;
    int place;  // of x
  };

  static constexpr int kLogRW = RW == 4 ? 2 : RW / 2;
  static constexpr int kPieces = 8 * kTiles, kRows = 32 / kPieces;  // of a row of x; rows at once

  __device__ __forceinline__ int scale_log() const {
    return UNIT == kSteps && p.scale_bytes == 4 ? 2 : 1;
  }

  __device__ __forceinline__ Source source(int unit) const {
    const int row_tile = first_row / 16 % 4, log = scale_log();
    const int64_t of_rows = static_cast<int64_t>(first_row / kSide) * p.k_tiles;
    Source s;
    s.codes = reinterpret_cast<const char*>(p.tiles) + (of_rows + unit * kTiles) * (512 * BITS) +
              (BITS == 3 ? row_tile * 256 : row_tile * 128 * BITS) + 16 * lane;
    const int group = kGrids > 1 ? 0 : group_of(unit);
    const int64_t grid = static_cast<int64_t>(group) * p.scale_stride + first_row;
    s.scales = static_cast<const char*>(p.scales) + (grid << log) + (lane & ((RW << log) - 1)) * 16;
    s.zeros = p.zeros + grid + lane % RW * 16;
    s.copies_scales = lane >> (kLogRW + log) < kGrids;
    s.copies_zeros = p.zeros && lane >> kLogRW < kGrids;
    s.left = (group + 1) * p.runs_of_group - unit;
    s.place = unit * (kTiles * kSide) + lane % kPieces * 8;
    s.x = static_cast<const T*>(p.x) + (lane / kPieces * p.k + s.place);
    return s;
  }

  __device__ __forceinline__ int group_of(int run) const {
    return min(static_cast<int>(__umulhi(2 * run + 1, p.group_of_run)), p.groups - 1);
  }

  // The group of the grid, of the unit's several, that a lane copies pieces of.
  __device__ __forceinline__ int64_t group_of_grid(int unit, int lanes_log) const {
    return group_of((4 * unit + (lane >> lanes_log) * kStepsOfGrid) / (p.run / 16));
  }

  // Copy the weight of a unit and go on to the next.
  __device__ __forceinline__ void copy_weight(Source& s, int unit, uint32_t to) const {
    constexpr int kCodePieces = kTileBytes / 16;
    to += 16 * lane;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < (kCodePieces + 31) / 32; ++j) {
        const int i = lane + 32 * j;
        int at = 512 * BITS * t + 512 * j;
        if constexpr (BITS == 3) {  // the plane of the highest bits lies further on
          at += i < RW * 16 ? 0 : 1024 - RW * 256 - first_row / 16 % 4 * 128;
        }
        if (kCodePieces % 32 == 0 || i < kCodePieces) {
          copy_once(to + kTileBytes * t + 512 * j, s.codes + at, p.policy);
        }
      }
    }
    s.codes += kTiles * 512 * BITS;
    const uint32_t zeros_to = to + grid_at + (kGrids * 16 * RW << scale_log());
    if constexpr (kGrids > 1) {
      if (s.copies_scales) {
        const int64_t row = group_of_grid(unit, kLogRW + scale_log()) * p.scale_stride;
        copy(to + grid_at, s.scales + (row << scale_log()));
      }
      if (s.copies_zeros) {
        copy(zeros_to, s.zeros + group_of_grid(unit, kLogRW) * p.scale_stride);
      }
    } else {
      if (s.copies_scales) {
        copy(to + grid_at, s.scales);
      }
      if (s.copies_zeros) {
        copy(zeros_to, s.zeros);
      }
      if (--s.left == 0) {
        s.left = p.runs_of_group;
        s.scales += 2 * p.scale_stride;
        s.zeros += p.scale_stride;
      }
    }
  }

  // Copy x of a unit and go on to the next.
  __device__ __forceinline__ void copy_x(Source& s, uint32_t to) const {
    const int row = lane / kPieces;
    const uint32_t at = to + kWeightBytes + row * kPitch + lane % kPieces * 16;
    const bool exists = s.place < p.k;
#pragma unroll
    for (int j = 0; j < 8 * NT / kRows; ++j) {
      if (j * kRows >= p.m) {
        break;
      }
      if (row + j * kRows < p.m) {
        copy_or_clear(at + j * kRows * kPitch, s.x + j * kRows * p.k, exists);
      }
    }
    s.x += kTiles * kSide;
    s.place += kTiles * kSide;
  }

  // Ask for the perm, which is needed as soon as x is there.
  __device__ __forceinline__ void prefetch_perm() const {
    for (int i = 32 * threadIdx.x; i < p.k; i += 32 * blockDim.x) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.perm + i));
    }
  }

  // Bring all of x into shared memory and there, with all warps, into the order of the tiles.
  __device__ __forceinline__ void sort_x(const int4& first_places) const {
    char* const sorted = memory + p.x_at;
    char* const raw = sorted + p.m * p.x_pitch;
    const uint4* from = static_cast<const uint4*>(p.x);
#pragma unroll 4
    for (int i = threadIdx.x; i < p.m * p.k / 8; i += blockDim.x) {
      reinterpret_cast<uint4*>(raw)[i] = from[i];
    }
    __syncthreads();
    int4 places = first_places;
#pragma unroll 2
    for (int at = 4 * threadIdx.x; at < p.k_tiles * kSide; at += 4 * blockDim.x) {
      const int next = at + 4 * blockDim.x;
      const int4 now = places;
      if (next < p.k) {
        places = *reinterpret_cast<const int4*>(p.perm + next);
      }
      for (int row = 0; row < p.m; ++row) {
        const uint16_t* x = reinterpret_cast<const uint16_t*>(raw) + row * p.k;
        uint2 v = make_uint2(0, 0);
        if (at < p.k) {
          v.x = x[now.x] | static_cast<uint32_t>(x[now.y]) << 16;
          v.y = x[now.z] | static_cast<uint32_t>(x[now.w]) << 16;
        }
        *reinterpret_cast<uint2*>(sorted + row * p.x_pitch + 2 * at) = v;
      }
    }
    __syncthreads();
  }

  using Sums = float[kParts][RW][NT][4];
  using Ones = float[kParts][NT][4];

  template <bool ZEROS>
  __device__ __forceinline__ void fold(float (&total)[RW][NT][4],
                                       const Sums& sum,
                                       const Ones& ones,
                                       const char* stage,
                                       int grid) const {
    const char* scales = stage + grid_at;
    const char* zeros = scales + (kGrids * 16 * RW << scale_log());
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (grid * RW + r) * 16 + h * 8 + lane / 4;
        const float scale = widen_scale(scales, at);
        const float unit = Raw<BITS, T>::unit(h);
        float taken = -(Raw<BITS, T>::base() + unit * (1 << (BITS - 1)));
        if (ZEROS) {
          const float zero = reinterpret_cast<const uint8_t*>(zeros)[at];
          taken = -(Raw<BITS, T>::base() + unit * zero);
        }
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float all = sum[0][r][t][2 * h + i], of_x = ones[0][t][i];
            if (kParts == 2) {
              all += sum[kParts - 1][r][t][2 * h + i];
              of_x += ones[kParts - 1][t][i];
            }
            total[r][t][2 * h + i] += scale * (all + taken * of_x);
          }
        }
      }
    }
  }

  __device__ __forceinline__ float widen_scale(const char* scales, int at) const {
    uint32_t bits = 0;
    if (UNIT == kSteps && p.scale_bytes == 4) {
      bits = reinterpret_cast<const uint32_t*>(scales)[at];
    } else {
      bits = reinterpret_cast<const uint16_t*>(scales)[at];
    }
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    return p.scale_type == kFloat16 ? half : __uint_as_float(bits << p.scale_shift);
  }

  using Operands = uint32_t[NT][8];  // the B operands of a tile's four steps

  // From shared memory: a stage, or a unit of all of x.
  __device__ __forceinline__ void read_x(Operands& b, const char* unit, int tile) const {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      int at = x_at;
      if (t == 1) {
        at += (min(8 + lane / 4, p.m - 1) - lane / 4) * kPitch;
      }
      const char* x = unit + at + tile * 128;
      if constexpr (UNIT == kHalves) {
        const uint4* from = reinterpret_cast<const uint4*>(x) + lane % 4;
        const uint4 u = from[0], v = from[4];
        b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
        b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
      } else if constexpr (UNIT == kSteps) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint2 u = *reinterpret_cast<const uint2*>(x + 2 * place_of(s, lane % 4, p.run));
          b[t][2 * s] = u.x, b[t][2 * s + 1] = u.y;
        }
      } else {
        const uint4* from = reinterpret_cast<const uint4*>(x);
        const uint4 u = from[0], v = from[1];
        b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
        b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
      }
    }
  }

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

  __device__ __forceinline__ void multiply(float (&total)[RW][NT][4],
                                           Sums& sum,
                                           Ones& ones,
                                           const Operands& b,
                                           const char* stage,
                                           int tile) const {
    const uint32_t one = Pairs<T>::constant(1.0f), all_ones[4] = {one, one, one, one};
    const int part = kParts == 2 ? tile : 0;
#pragma unroll
    for (int grid = 0; grid < kGrids; ++grid) {
#pragma unroll
      for (int s = grid * kStepsOfGrid; s < (grid + 1) * kStepsOfGrid; ++s) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          mma<T>(ones[part][t], all_ones, b[t][2 * s], b[t][2 * s + 1]);
        }
      }
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        const LaneCodes<BITS> codes = read_codes<BITS>(stage + kTileBytes * tile, r, RW, lane);
#pragma unroll
        for (int s = grid * kStepsOfGrid; s < (grid + 1) * kStepsOfGrid; ++s) {
          uint32_t a[4];
          Raw<BITS, T>::operand(codes, s, a);
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(sum[part][r][t], a, b[t][2 * s], b[t][2 * s + 1]);
          }
        }
      }
      if (kGrids > 1 || tile == kTiles - 1) {
        if (p.zeros) {
          fold<true>(total, sum, ones, stage, grid);
        } else {
          fold<false>(total, sum, ones, stage, grid);
        }
        clear(sum, ones);
      }
    }
  }

  __device__ __forceinline__ static void clear(Sums& sum, Ones& ones) {
#pragma unroll
    for (int i = 0; i < kParts * NT * 4; ++i) {
      (&ones[0][0][0])[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < kParts * RW * NT * 4; ++i) {
      (&sum[0][0][0][0])[i] = 0;
    }
  }

  // Multiply by the units [first, last) and leave this warp's part of the sums in its memory.
  __device__ __forceinline__ void run_warp(int first, int last) const {
    let_next_kernel_start();
    Source from = source(first);
    const uint32_t begin = shared_address(ring), end = begin + STAGES * bytes;
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
      if (first + i < last) {
        copy_weight(from, first + i, begin + i * bytes);
      }
      end_group();
    }
    Operands held[kTiles];
    if constexpr (X == kByPerm) {
      prefetch_perm();
      int4 places = make_int4(0, 0, 0, 0);
      if (4 * static_cast<int>(threadIdx.x) < p.k) {
        places = reinterpret_cast<const int4*>(p.perm)[threadIdx.x];
      }
      wait_for_previous_kernel();
      sort_x(places);
    } else if constexpr (X == kRegisters) {
      wait_for_previous_kernel();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (first < last) {
          load_x(held[tile], first * kTiles + tile);
        }
      }
    } else {
      wait_for_previous_kernel();
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
    const char* stage = ring;
#pragma unroll 1
    for (int unit = first; unit < last; ++unit) {
      // Groups end in the order of units, those of weights before those of x: what is under way
      // after this belongs to the next STAGES - 1 units.
      wait_for_groups<STAGES - 1>();
      __syncwarp();
      Sums sum = {};
      Ones ones = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (X == kRegisters) {
          multiply(total, sum, ones, held[tile], stage, tile);
          if (unit + 1 < last) {
            load_x(held[tile], (unit + 1) * kTiles + tile);
          }
        } else {
          read_x(held[0], X == kRing ? stage : memory + p.x_at + unit * (kTiles * 128), tile);
          multiply(total, sum, ones, held[0], stage, tile);
        }
      }
      __syncwarp();
      if (unit + STAGES < last) {
        copy_weight(from, unit + STAGES, slot);
        if constexpr (X == kRing) {
          copy_x(from, slot);
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
