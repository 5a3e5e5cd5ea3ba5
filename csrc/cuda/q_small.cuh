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

#include "q_small_block.cuh"

namespace auto_gptq {

// STAGES: units in the ring.
template <int BITS, typename T, int NT, int RW, int WN, int STAGES, Unit UNIT, Activations X>
struct SmallKernel : SmallBlock<BITS, T, NT, RW, WN> {
  using Block = SmallBlock<BITS, T, NT, RW, WN>;
  using typename Block::Operands, typename Block::SumsOfX;
  using Block::p, Block::lane, Block::first_row, Block::memory, Block::ring;
  using Block::group_of, Block::load_x, Block::own_rows, Block::put;
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
    const int perm = X == kByPerm ? kTiles * kSide * 4 : 0;
    return kWeightBytes + (X == kRegisters ? 0 : perm > m * kPitch ? perm : m * kPitch);
  }

  const int bytes, grid_at;  // of a stage, and where its scales begin
  int x_at;                  // where this lane's part of x begins in a stage

  __device__ SmallKernel(const Small& task, char* shared)
      : Block(task, shared),
        bytes(stage_bytes(task.m, task.scale_bytes, task.zeros != nullptr)),
        grid_at(x_end(task.m)) {
    // Rows beyond M only reach columns that nobody writes.
    x_at = kWeightBytes + min(lane / 4, task.m - 1) * kPitch + (kGrids > 1 ? 0 : lane % 4 * 32);
  }

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

  // The group of the grid, of the unit's several, that a lane copies pieces of.
  __device__ __forceinline__ int64_t group_of_grid(int unit, int lanes_log) const {
    return group_of((4 * unit + (lane >> lanes_log) * kStepsOfGrid) / (p.run / 16));
  }

  // Where a lane's piece j of a unit's codes lies behind its piece 0 of the first plane, in bytes.
  __device__ __forceinline__ int place_of_piece(int j) const {
    constexpr int kOfTile = kTileBytes / 16;
    if (BITS != 3 && kOfTile % 32 == 0) {
      return 32 * j / kOfTile * (512 * BITS) + 32 * j % kOfTile * 16;
    }
    const int piece = lane + 32 * j, within = piece % kOfTile;
    const bool high = BITS == 3 && within >= RW * 16;  // the plane of the highest bits
    return piece / kOfTile * (512 * BITS) + 16 * (within - lane) +
           (high ? 1024 - RW * 256 - first_row / 16 % 4 * 128 : 0);
  }

  // Copy the weight of a unit and go on to the next.
  __device__ __forceinline__ void copy_weight(Source& s, int unit, uint32_t to) const {
    constexpr int kCodePieces = kWeightBytes / 16;
    to += 16 * lane;
#pragma unroll
    for (int j = 0; j < (kCodePieces + 31) / 32; ++j) {
      const char* codes = s.codes + place_of_piece(j);
      if (32 * j + 32 <= kCodePieces) {
        copy_once(to + 512 * j, codes, p.policy);
      } else if (lane + 32 * j < kCodePieces) {  // where some lanes rest, ptxas 13.0 loses the policy
        copy(to + 512 * j, codes);
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

  // Copy the perm of a unit to where its x is going to be.
  __device__ __forceinline__ void copy_perm(int unit, uint32_t to) const {
    const int place = unit * (kTiles * kSide) + 4 * lane;
    if (kTiles == 2 || lane < kSide / 4) {
      copy_or_clear(to + kWeightBytes + 16 * lane, p.perm + place, place < p.k);
    }
  }

  // Bring all of x, as it is, into shared memory.
  __device__ __forceinline__ void keep_x() const {
    uint4* const kept = reinterpret_cast<uint4*>(memory + p.x_at);
    const uint4* from = static_cast<const uint4*>(p.x);
#pragma unroll 4
    for (int i = threadIdx.x; i < p.m * p.k / 8; i += blockDim.x) {
      kept[i] = from[i];
    }
    __syncthreads();
  }

  // Put x of a unit, in the order of the tiles, where its perm is.
  __device__ __forceinline__ void sort_x(int unit, char* stage) const {
    const bool takes_part = kTiles == 2 || lane < kSide / 4;
    char* const to = stage + kWeightBytes;
    int4 from = make_int4(0, 0, 0, 0);
    if (takes_part) {
      from = reinterpret_cast<const int4*>(to)[lane];
    }
    __syncwarp();
    const bool exists = unit * (kTiles * kSide) + 4 * lane < p.k;
    for (int row = 0; row < p.m; ++row) {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(memory + p.x_at) + row * p.k;
      if (takes_part) {
        const uint32_t low = x[from.x] | static_cast<uint32_t>(x[from.y]) << 16;
        const uint32_t high = x[from.z] | static_cast<uint32_t>(x[from.w]) << 16;
        reinterpret_cast<uint2*>(to + row * kPitch)[lane] =
            exists ? make_uint2(low, high) : make_uint2(0, 0);
      }
    }
    __syncwarp();
  }

  using Sums = float[kParts][RW][NT][4];

  template <bool ZEROS>
  __device__ __forceinline__ void fold_with(float (&total)[RW][NT][4],
                                            const Sums& sum,
                                            const SumsOfX& sums_of_x,
                                            const char* stage,
                                            int grid) const {
    const char* scales = stage + grid_at;
    const char* zeros = scales + (kGrids * 16 * RW << scale_log());
    float of_x[NT][2];
    own_rows(of_x, sums_of_x);
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
            float all = sum[0][r][t][2 * h + i];
            if (kParts == 2) {
              all += sum[kParts - 1][r][t][2 * h + i];
            }
            total[r][t][2 * h + i] += scale * (all + taken * of_x[t][i]);
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

  __device__ __forceinline__ void read_x(Operands& b, const char* stage, int tile) const {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      int at = x_at;
      if (t == 1) {
        at += (min(8 + lane / 4, p.m - 1) - lane / 4) * kPitch;
      }
      const char* x = stage + at + tile * 128;
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

  __device__ __forceinline__ void multiply(float (&total)[RW][NT][4],
                                           Sums& sum,
                                           SumsOfX& sums_of_x,
                                           const Operands& b,
                                           const char* stage,
                                           int tile) const {
    const int part = kParts == 2 ? tile : 0;
#pragma unroll
    for (int grid = 0; grid < kGrids; ++grid) {
      Block::template add_x<kStepsOfGrid>(sums_of_x, b, grid * kStepsOfGrid);
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
        load_x(x[tile], unit * kTiles + tile);
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
        copy_weight(from, first + i, begin + i * bytes);
        if constexpr (X == kByPerm) {
          copy_perm(first + i, begin + i * bytes);
        }
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
            load_x(held[tile], (unit + 1) * kTiles + tile);
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
