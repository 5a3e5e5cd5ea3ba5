// y = x W^T for up to 16 rows of x, bound by reading the weight.
//
// A block takes 16 * RW outputs after another, and its warps share out the inputs.  A warp copies its
// tiles, and their scales, into a ring of its own in shared memory, many tiles ahead: the first ones
// before the previous kernel has ended, because weights do not depend on it.  Codes go to tensor cores as raw numbers,
// unit * code + base; sums of x, which a product with ones gives, then take out base and zero point,
// so that both cost nothing per weight and a group's sum is one of integers times x.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../launch.h"
#include "device.h"
#include "mma.cuh"
#include "q_small.h"
#include "tiles.cuh"

namespace auto_gptq {

struct Small {
  const uint32_t* tiles;
  const void* scales;
  const uint8_t* zeros;
  const int32_t* perm;  // null if x is in the order of the tiles
  const void* x;
  const void* bias;
  void* y;
  int32_t m, k, n;
  int32_t scale_stride;   // N'
  int32_t k_tiles;        // K' / 64
  int32_t units;          // of the kernel
  int32_t groups;         // G
  int32_t run;            // 16, 32 or 64 places that share a scale
  int32_t runs_of_group;  // or units
  uint32_t group_of_run;  // multiplier: run (or unit) r is in group umulhi(2 r + 1, group_of_run)
  int32_t scale_bytes;    // 2 or 4
  int32_t scale_shift;    // what makes a scale's bits those of a float: 16 for bf16, 0 for fp32
  int32_t warps_log;      // of a block
  int32_t warp_bytes;     // shared memory of a warp
  int32_t x_pitch;        // bytes from a row of x to the next, there
  int32_t blocks;         // of outputs
  bool streams_x;         // x comes with every unit, because all of it does not fit
  DataType scale_type;
};

// How codes become numbers without arithmetic: row h of a pair of rows is unit(h) * code + base.
// fp16: the code's bits alone are a subnormal number.  bf16: they are put into 128's mantissa.
template <int BITS, typename T>
struct Raw {
  static constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  static constexpr uint32_t kMagic = kIsHalf ? 0 : 0x43004300;

  __device__ static constexpr float base() {
    return kIsHalf ? 0.0f : BITS == 8 ? -128.0f : 128.0f;
  }
  __device__ static constexpr float unit(int h) {
    const float step = BITS == 4 && kIsHalf ? 16.0f : BITS < 4 ? 4.0f : 1.0f;
    return (kIsHalf ? 1.0f / (1 << 24) : 1.0f) * (h ? step : 1.0f);
  }

  __device__ __forceinline__ static uint32_t field(uint32_t word, uint32_t mask) {
    return kIsHalf ? word & mask : masked_or(word, mask, kMagic);
  }

  __device__ __forceinline__ static void operand(const LaneCodes<BITS>& codes,
                                                 int step,
                                                 uint32_t (&a)[4]) {
    if constexpr (BITS == 8 && !kIsHalf) {
      decode<BITS, T>(codes, step, a);
    } else if constexpr (BITS == 8) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        a[f] = codes.word[2 * step + f / 2] >> (f % 2 * 8) & 0x00ff00ff;
      }
    } else if constexpr (BITS == 4) {
      const uint32_t word = codes.word[step];
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const bool stays = kIsHalf && f % 2 == 1;  // times 16
        a[f] = field(word >> (stays ? f * 4 - 4 : f * 4), stays ? 0x00f000f0 : 0x000f000f);
      }
    } else {
      const int word = step / 2, odd = step % 2;
      const uint32_t first = codes.word[word] >> (8 * odd), second = first >> 4;
      if constexpr (BITS == 2) {
        a[0] = field(first, 0x00030003);
        a[1] = field(first, 0x000c000c);
        a[2] = field(second, 0x00030003);
        a[3] = field(second, 0x000c000c);
      } else {
        const uint32_t high = codes.word[2];
        const uint32_t upper01 = high >> (8 * word + odd), upper2 = high >> (12 * word + 4 - 4 * word + odd);
        const uint32_t upper3 = word ? high << (4 - odd) : upper2;
        a[0] = masked_or(first, 0x00030003, field(upper01, 0x00040004));
        a[1] = masked_or(first, 0x000c000c, field(upper01, 0x00100010));
        a[2] = masked_or(second, 0x00030003, field(upper2, 0x00040004));
        a[3] = masked_or(second, 0x000c000c, field(upper3, 0x00100010));
      }
    }
  }
};

template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> read_codes(const char* stage, int rw, int row_tiles, int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 4 || BITS == 8) {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(stage)[(rw * (BITS / 4) + i) * 32 + lane];
      codes.word[4 * i] = v.x;
      codes.word[4 * i + 1] = v.y;
      codes.word[4 * i + 2] = v.z;
      codes.word[4 * i + 3] = v.w;
    }
  } else {
    const uint2 v = reinterpret_cast<const uint2*>(stage)[rw * 32 + lane];
    codes.word[0] = v.x;
    codes.word[1] = v.y;
    if constexpr (BITS == 3) {
      const char* plane = stage + 256 * row_tiles;
      codes.word[2] = reinterpret_cast<const uint32_t*>(plane)[rw * 32 + lane];
    }
  }
  return codes;
}

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (Pairs<T>::kMantissa == 10) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// What a stage of the ring holds: a unit of the inputs.
enum Unit {
  kPair,   // two tiles with one scale per output
  kTile,   // one tile with one scale per output
  kSteps,  // one tile whose four steps of 16 inputs have scales of their own
};

// NT: 8 rows of x each.  RW: 16 outputs each.  STAGES: units in the ring.
template <int BITS, typename T, int NT, int RW, int STAGES, Unit UNIT>
struct SmallKernel {
  static constexpr int kTiles = UNIT == kPair ? 2 : 1;  // of a unit
  static constexpr int kGrids = UNIT == kSteps ? 4 : 1;
  static constexpr int kTileBytes = RW * 128 * BITS;
  static constexpr int kWeightBytes = kTiles * kTileBytes;
  static constexpr int kXBytes = kTiles * 128;  // of a row of x, in a unit
  static constexpr int kOutputs = 16 * RW;
  static constexpr int kSumPitch = kOutputs + 4;  // keeps the lanes of a warp on banks of their own

  // Shared memory of one stage of one warp: codes, rows of x if they do not lie there for good,
  // scales, zeros.
  __host__ __device__ static int stage_bytes(int scale_bytes, bool zeros, int x_rows) {
    return kWeightBytes + x_rows * x_pitch(1) +
           kGrids * kOutputs * (scale_bytes + (zeros ? 1 : 0));
  }
  // Rows of x lie 16 bytes apart modulo 128, so that the 8 rows of a fragment meet no bank twice.
  __host__ __device__ static int x_pitch(int units) { return units * kXBytes + 16; }
  // Two sets of the warps' sums: one is written while the other is still read.
  __host__ __device__ static int sums_bytes(int warps, int m) {
    return 2 * warps * m * kSumPitch * 4;
  }

  const Small& p;
  const int lane, warp, warps;
  const int first, last;  // units of this warp
  char* const ring;       // of this warp: stages, then all of x that it needs, if that fits
  float* const sums;      // of the block
  const int bytes;        // of a stage
  const int grid_at;      // where its scales begin

  __device__ SmallKernel(const Small& task, char* memory)
      : p(task),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        warps(blockDim.x / 32),
        first(task.units * warp >> task.warps_log),
        last(task.units * (warp + 1) >> task.warps_log),
        ring(memory + sums_bytes(warps, task.m) + warp * task.warp_bytes),
        sums(reinterpret_cast<float*>(memory)),
        bytes(stage_bytes(task.scale_bytes, task.zeros != nullptr, task.streams_x ? task.m : 0)),
        grid_at(kWeightBytes + (task.streams_x ? task.m * x_pitch(1) : 0)) {}

  // What a lane copies of the next unit, in pieces of 16 bytes: codes, and at most one piece of the
  // scales and one of the zeros.
  struct Source {
    int block, unit;
    const char* codes;
    const char* scales;    // of the unit's group, or of the first if UNIT is kSteps
    const uint8_t* zeros;  // likewise
    int left;              // units of this group that are still to come
  };

  static constexpr int kLogRW = RW == 4 ? 2 : RW / 2;

  __device__ __forceinline__ int scale_log() const {
    return UNIT == kSteps && p.scale_bytes == 4 ? 2 : 1;
  }

  __device__ __forceinline__ Source source(int block) const {
    const int first_row = block * kOutputs, row_tile = first_row / 16 % 4, log = scale_log();
    const int64_t of_rows = static_cast<int64_t>(first_row / kSide) * p.k_tiles;
    Source s;
    s.block = block;
    s.unit = first;
    s.codes = reinterpret_cast<const char*>(p.tiles) + (of_rows + first * kTiles) * (512 * BITS) +
              (BITS == 3 ? row_tile * 256 : row_tile * 128 * BITS) + 16 * lane;
    const int group = UNIT == kSteps ? 0 : group_of(first);
    const int64_t grid = static_cast<int64_t>(group) * p.scale_stride + first_row;
    s.scales =
        static_cast<const char*>(p.scales) + (grid << log) + (lane & ((RW << log) - 1)) * 16;
    s.zeros = p.zeros + grid + lane % RW * 16;
    s.left = (group + 1) * p.runs_of_group - first;
    return s;
  }

  __device__ __forceinline__ int group_of(int run) const {
    return min(static_cast<int>(__umulhi(2 * run + 1, p.group_of_run)), p.groups - 1);
  }

  // The group of the grid, one of four, that a lane copies pieces of.
  __device__ __forceinline__ int64_t group_of_step(int unit, int lanes_log) const {
    return group_of((4 * unit + (lane >> lanes_log)) / (p.run / 16));
  }

  // Copy the weight of a unit and go on to the next.
  __device__ __forceinline__ void copy_weight(Source& s, uint32_t to, uint64_t policy) const {
    constexpr int kCodePieces = kTileBytes / 16;
    to += 16 * lane;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < (kCodePieces + 31) / 32; ++j) {
        const int i = lane + 32 * j;
        int at = 512 * BITS * t + 512 * j;
        if constexpr (BITS == 3) {  // the plane of the highest bits lies further on
          at += i < RW * 16 ? 0 : 1024 - RW * 256 - s.block * RW % 4 * 128;
        }
        if (kCodePieces % 32 == 0 || i < kCodePieces) {
          copy_once(to + kTileBytes * t + 512 * j, s.codes + at, policy);
        }
      }
    }
    s.codes += kTiles * 512 * BITS;
    const uint32_t zeros_to = to + grid_at + (kGrids * kOutputs << scale_log());
    const bool copies_scales = lane < kGrids * RW << scale_log();
    const bool copies_zeros = p.zeros && lane < kGrids * RW;
    if constexpr (UNIT == kSteps) {
      if (copies_scales) {
        const int64_t row = group_of_step(s.unit, kLogRW + scale_log()) * p.scale_stride;
        copy(to + grid_at, s.scales + (row << scale_log()));
      }
      if (copies_zeros) {
        copy(zeros_to, s.zeros + group_of_step(s.unit, kLogRW) * p.scale_stride);
      }
    } else {
      if (copies_scales) {
        copy(to + grid_at, s.scales);
      }
      if (copies_zeros) {
        copy(zeros_to, s.zeros);
      }
      if (--s.left == 0) {
        s.left = p.runs_of_group;
        s.scales += 2 * p.scale_stride;
        s.zeros += p.scale_stride;
      }
    }
    if (++s.unit == last) {
      s = source(s.block + gridDim.x);
    }
  }

  // Copy all of x that this warp needs.
  __device__ __forceinline__ void copy_x(uint32_t to) const {
    const int pieces = (last - first) * (kXBytes / 16);
    for (int row = 0; row < p.m; ++row, to += p.x_pitch) {
      const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k;
      for (int i = lane; i < pieces; i += 32) {
        const int place = first * (kTiles * kSide) + 8 * i;
        copy_or_clear(to + 16 * i, x + place, place < p.k);
      }
    }
  }

  // The same in the order of the tiles: all of x is brought to the block first, because gathering
  // from global memory, 2 bytes at a time, would be slow.
  __device__ __forceinline__ void sort_x(char* to, uint4* all) const {
    const int pieces = p.m * p.k / 8;
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
      all[i] = reinterpret_cast<const uint4*>(p.x)[i];
    }
    __syncthreads();
    const int begin = first * (kTiles * kSide), end = last * (kTiles * kSide);
    for (int place = begin + 4 * lane; place < end; place += 128) {
      const bool exists = place < p.k;
      const int4 from = exists ? *reinterpret_cast<const int4*>(p.perm + place) : int4{};
      for (int row = 0; row < p.m; ++row) {
        const uint16_t* x = reinterpret_cast<const uint16_t*>(all) + row * p.k;
        uint2 v{};
        if (exists) {
          v.x = x[from.x] | static_cast<uint32_t>(x[from.y]) << 16;
          v.y = x[from.z] | static_cast<uint32_t>(x[from.w]) << 16;
        }
        *reinterpret_cast<uint2*>(to + row * p.x_pitch + 2 * (place - begin)) = v;
      }
    }
  }

  // Ask for the part of perm that this warp will need.
  __device__ __forceinline__ void fetch_perm() const {
    const int end = min(last * (kTiles * kSide), p.k);
    for (int place = first * (kTiles * kSide) + 32 * lane; place < end; place += 1024) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.perm + place));
    }
  }

  // Copy x of one unit into a stage.
  __device__ __forceinline__ void copy_x(int unit, uint32_t to) const {
    constexpr int kPieces = kXBytes / 16, kRows = 32 / kPieces;  // of a row; rows at once
    const int place = unit * (kTiles * kSide) + lane % kPieces * 8;
    const T* x = static_cast<const T*>(p.x) + place;
    to += kWeightBytes + lane % kPieces * 16;
#pragma unroll
    for (int j = 0; j < 8 * NT / kRows; ++j) {
      const int row = lane / kPieces + j * kRows;
      if (row < p.m) {
        copy_or_clear(to + row * x_pitch(1), x + static_cast<int64_t>(row) * p.k, place < p.k);
      }
    }
  }

  // A product waits for the one that it adds to: with little else to do, two tiles are summed apart.
  static constexpr int kChains = RW * NT <= 2 ? kTiles : 1;
  using Sums = float[kChains][RW][NT][4];
  using Ones = float[kChains][NT][4];

  // Add scale * (code - zero) x of one grid to the totals, which stay in units of Raw.
  template <bool ZEROS>
  __device__ __forceinline__ void fold(float (&total)[RW][NT][4],
                                       const Sums& sum,
                                       const Ones& ones,
                                       const char* stage,
                                       int grid) const {
    const char* scales = stage + grid_at;
    const char* zeros = scales + (kGrids * kOutputs << scale_log());
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
            if (kChains == 2) {
              all += sum[kChains - 1][r][t][2 * h + i];
              of_x += ones[kChains - 1][t][i];
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

  // The B operands of a tile's four steps.
  __device__ __forceinline__ void read_x(uint32_t (&b)[NT][8],
                                         const char* x,  // of the unit, row 0
                                         int tile) const {
    const int pitch = p.x_pitch;
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      // Rows beyond M only reach columns that nobody writes.
      const char* row = x + min(t * 8 + lane / 4, p.m - 1) * pitch + tile * 128;
      if constexpr (UNIT == kSteps) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint2 u = *reinterpret_cast<const uint2*>(row + 2 * place_of(s, lane % 4, p.run));
          b[t][2 * s] = u.x, b[t][2 * s + 1] = u.y;
        }
      } else {
        const uint4* from = reinterpret_cast<const uint4*>(row + lane % 4 * 32);
        const uint4 u = from[0], v = from[1];
        b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
        b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&total)[RW][NT][4],
                                           const char* stage,
                                           const char* x) const {
    const uint32_t one = Pairs<T>::constant(1.0f), all_ones[4] = {one, one, one, one};
    Sums sum = {};
    Ones ones = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t b[NT][8];
      read_x(b, x, tile);
      LaneCodes<BITS> codes[RW];
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        codes[r] = read_codes<BITS>(stage + kTileBytes * tile, r, RW, lane);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          mma<T>(ones[tile % kChains][t], all_ones, b[t][2 * s], b[t][2 * s + 1]);
        }
#pragma unroll
        for (int r = 0; r < RW; ++r) {
          uint32_t a[4];
          Raw<BITS, T>::operand(codes[r], s, a);
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(sum[tile % kChains][r][t], a, b[t][2 * s], b[t][2 * s + 1]);
          }
        }
        if constexpr (UNIT == kSteps) {
          if (p.zeros) {
            fold<true>(total, sum, ones, stage, s);
          } else {
            fold<false>(total, sum, ones, stage, s);
          }
          clear(sum, ones);
        }
      }
    }
    if constexpr (UNIT != kSteps) {
      if (p.zeros) {
        fold<true>(total, sum, ones, stage, 0);
      } else {
        fold<false>(total, sum, ones, stage, 0);
      }
    }
  }

  __device__ __forceinline__ static void clear(Sums& sum, Ones& ones) {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ones[0][t][i] = 0;
#pragma unroll
        for (int r = 0; r < RW; ++r) {
          sum[0][r][t][i] = 0;
        }
      }
    }
  }

  __device__ __forceinline__ void run() const {
    let_next_kernel_start();
    const uint64_t policy = evict_first();
    Source next = source(first < last ? blockIdx.x : p.blocks);
    const uint32_t begin = shared_address(ring);
    for (int i = 0; i < STAGES; ++i) {
      if (next.block < p.blocks) {
        copy_weight(next, begin + i * bytes, policy);
      }
      end_group();
    }
    float bias = read_bias(blockIdx.x);
    char* const x = ring + STAGES * bytes;
    if (p.perm) {
      fetch_perm();
    }
    wait_for_previous_kernel();
    if (p.perm) {
      sort_x(x, reinterpret_cast<uint4*>(ring + (warps - warp) * p.warp_bytes));
      wait_for_groups<0>();
    } else if (p.streams_x) {
      for (int i = 0, unit = first; i < STAGES; ++i) {
        if (first < last) {
          copy_x(unit, begin + i * bytes);
        }
        end_group();
        unit = unit + 1 == last ? first : unit + 1;
      }
    } else {
      copy_x(shared_address(x));
      end_group();
      wait_for_groups<0>();
    }
    int slot = 0;
    float* part = sums;
    for (int block = blockIdx.x; block < p.blocks; block += gridDim.x) {
      float total[RW][NT][4] = {};
#pragma unroll 1
      for (int unit = first; unit < last; ++unit) {
        // Groups end in the order of units, at first those of weights before those of x: what may
        // be under way belongs to the next STAGES - 1 units.
        wait_for_groups<STAGES - 1>();
        __syncwarp();
        const char* stage = ring + slot * bytes;
        multiply(total, stage, p.streams_x ? stage + kWeightBytes : x + (unit - first) * kXBytes);
        __syncwarp();
        if (next.block < p.blocks) {
          if (p.streams_x) {
            copy_x(next.unit, begin + slot * bytes);
          }
          copy_weight(next, begin + slot * bytes, policy);
        }
        end_group();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
      }
      put_sums(total, part);
      __syncthreads();
      write(block, part, bias);
      bias = read_bias(block + gridDim.x);
      part = part == sums ? sums + warps * p.m * kSumPitch : sums;
    }
  }

  __device__ __forceinline__ void put_sums(const float (&total)[RW][NT][4], float* part) const {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = t * 8 + lane % 4 * 2 + i;
        float* row = part + (warp * p.m + m) * kSumPitch + lane / 4;
        if (m < p.m) {
#pragma unroll
          for (int r = 0; r < RW; ++r) {
            row[16 * r] = total[r][t][i] * (1.0f / Raw<BITS, T>::unit(0));
            row[16 * r + 8] = total[r][t][2 + i] * (1.0f / Raw<BITS, T>::unit(1));
          }
        }
      }
    }
  }

  // A thread writes one output of every row of x that it comes to, so it needs one bias.
  __device__ __forceinline__ float read_bias(int block) const {
    const int n = block * kOutputs + threadIdx.x % kOutputs;
    return p.bias && n < p.n ? static_cast<float>(static_cast<const T*>(p.bias)[n]) : 0;
  }

  __device__ __forceinline__ void write(int block, const float* part, float bias) const {
    const int r = threadIdx.x % kOutputs, n = block * kOutputs + r;
    for (int m = threadIdx.x / kOutputs; m < p.m; m += blockDim.x / kOutputs) {
      float value = bias;
      for (int w = 0; w < warps; ++w) {
        value += part[(w * p.m + m) * kSumPitch + r];
      }
      if (n < p.n) {
        static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.n + n] = narrow<T>(value);
      }
    }
  }
};

template <int BITS, typename T, int NT, int RW, int STAGES, Unit UNIT>
__global__ void __launch_bounds__(512) q_small(const __grid_constant__ Small task) {
  extern __shared__ __align__(16) char memory[];
  SmallKernel<BITS, T, NT, RW, STAGES, UNIT>(task, memory).run();
}

inline Small describe(const Product& product) {
  const Tiled& weight = product.weight;
  Small task{};
  task.tiles = weight.tiles;
  task.scales = weight.scales;
  task.zeros = weight.zeros;
  task.perm = weight.perm;
  task.x = product.x;
  task.bias = product.bias;
  task.y = product.y;
  task.m = static_cast<int32_t>(product.m);
  task.k = static_cast<int32_t>(weight.k);
  task.n = static_cast<int32_t>(weight.n);
  task.scale_stride = (task.n + kSide - 1) / kSide * kSide;
  task.k_tiles = (task.k + kSide - 1) / kSide;
  task.groups = static_cast<int32_t>(weight.groups);
  task.run = weight.run;
  task.scale_bytes = weight.scale_type == kFloat32 ? 4 : 2;
  task.scale_shift = weight.scale_type == kBFloat16 ? 16 : 0;
  task.scale_type = weight.scale_type;
  return task;
}

template <int BITS, typename T, int NT, int RW, int STAGES, Unit UNIT>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  using Kernel = SmallKernel<BITS, T, NT, RW, STAGES, UNIT>;
  Small task = describe(product);
  task.units = task.k_tiles / Kernel::kTiles;
  task.blocks = task.scale_stride / Kernel::kOutputs;
  const int64_t runs = product.weight.group_size / (UNIT == kPair ? 128 : task.run);
  task.runs_of_group = static_cast<int32_t>(runs);
  task.group_of_run = static_cast<uint32_t>(((int64_t{1} << 32) + 2 * runs - 1) / (2 * runs));
  const Device& device = current_device();
  int warps = config.warps, shared = 0;
  for (;; warps /= 2) {
    const int most_units = (task.units + warps - 1) / warps;
    const auto bytes_of_stage = [&](int rows) {
      return Kernel::stage_bytes(task.scale_bytes, task.zeros != nullptr, rows);
    };
    const int64_t resident = static_cast<int64_t>(task.m) * Kernel::x_pitch(most_units);
    const int64_t sums = Kernel::sums_bytes(warps, task.m);
    const int64_t unsorted = task.perm ? int64_t{2} * task.m * task.k : 0;
    const int64_t all = sums + warps * (STAGES * bytes_of_stage(0) + resident) + unsorted;
    task.streams_x = !task.perm && (all > device.shared_bytes || all > config.most_shared);
    task.x_pitch = Kernel::x_pitch(task.streams_x ? 1 : most_units);
    task.warp_bytes = STAGES * bytes_of_stage(task.streams_x ? task.m : 0) +
                      (task.streams_x ? 0 : static_cast<int>(resident));
    shared = static_cast<int>(sums + unsorted) + warps * task.warp_bytes;
    if (warps == 1 || shared <= device.shared_bytes) {
      break;
    }
  }
  while (1 << task.warps_log < warps) {
    ++task.warps_log;
  }
  const int blocks = std::min(task.blocks, config.blocks_per_processor * device.processors);
  return launch(q_small<BITS, T, NT, RW, STAGES, UNIT>, task, blocks, 32 * warps, shared, stream);
}

template <int BITS, typename T, Unit UNIT>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  if (product.m > 8) {
    // A lane copies one piece of the scales: too few for 64 outputs with 4 grids in fp32.
    return config.row_tiles == 4 && UNIT != kSteps
               ? start_small<BITS, T, 2, 4, 2, UNIT>(product, config, stream)
               : start_small<BITS, T, 2, 2, 2, UNIT>(product, config, stream);
  }
  return config.row_tiles == 1 ? start_small<BITS, T, 1, 1, 4, UNIT>(product, config, stream)
                               : start_small<BITS, T, 1, 2, 4, UNIT>(product, config, stream);
}

template <int BITS, typename T>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  const Tiled& weight = product.weight;
  if (weight.run != kSide || weight.scale_type == kFloat32) {
    return start_small<BITS, T, kSteps>(product, config, stream);
  }
  const bool paired = weight.group_size % 128 == 0 && (weight.k + kSide - 1) / kSide % 2 == 0;
  return paired ? start_small<BITS, T, kPair>(product, config, stream)
                : start_small<BITS, T, kTile>(product, config, stream);
}

template <int BITS>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  return product.type == kFloat16 ? start_small<BITS, __half>(product, config, stream)
                                  : start_small<BITS, __nv_bfloat16>(product, config, stream);
}

}  // namespace auto_gptq
