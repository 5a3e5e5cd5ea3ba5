// What a warp of q_small brings into shared memory: a ring of units of the inputs, with codes, scales
// and x, many tiles ahead; and all of x, where it has to be brought into order.
#pragma once

#include <cuda_runtime.h>

#include "q_small_block.cuh"

namespace auto_gptq {

template <int BITS, typename T, int NT, int RW, int WN, Unit UNIT, Activations X>
struct SmallRing : SmallBlock<BITS, T, NT, RW, WN> {
  using Block = SmallBlock<BITS, T, NT, RW, WN>;
  using typename Block::Operands;
  using Block::p, Block::lane, Block::first_row, Block::memory, Block::ring, Block::group_of;
  static constexpr int kTiles = UNIT == kPair ? 2 : 1;  // of a unit
  static constexpr int kGrids = UNIT == kSteps ? 4 : UNIT == kHalves ? 2 : 1;
  static constexpr int kStepsOfGrid = 4 / kGrids;  // where a tile has several
  static constexpr int kRun = kSide / kGrids;
  static constexpr int kTileBytes = RW * 128 * BITS;
  static constexpr int kWeightBytes = kTiles * kTileBytes;
  // Rows of x lie 16 bytes apart modulo 128, so that the 8 rows of a fragment meet no bank twice.
  static constexpr int kPitch = kTiles * 128 + 16;

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

  __device__ SmallRing(const Small& task, char* shared)
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
    const uint32_t kept = shared_address(memory + p.x_at);
    const char* from = static_cast<const char*>(p.x);
    for (int i = 16 * threadIdx.x; i < 2 * p.m * p.k; i += 16 * blockDim.x) {
      copy(kept + i, from + i);
    }
    end_group();
    wait_for_groups<0>();
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
};

}  // namespace auto_gptq
