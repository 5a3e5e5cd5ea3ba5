// y = x W^T for up to 16 rows of x, bound by reading the weight.
//
// A block owns 16 * RW outputs, and its warps share out the inputs.  A warp copies its tiles, and
// their scales, into a ring of its own in shared memory, many tiles ahead: before the previous
// kernel has ended, because weights do not depend on it.  Codes go to tensor cores as raw numbers,
// unit * code + base; sums of x, which a product with ones gives, then take out base and zero point,
// so that both cost nothing per weight and a group's sum is one of integers times x.
#pragma once

#include <cuda_runtime.h>

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
  const int32_t* perm;
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
  int32_t warp_bytes;     // shared memory of a warp
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
  // Rows of x lie 16 bytes apart modulo 128, so that the 8 rows of a fragment meet no bank twice.
  static constexpr int kPitch = kTiles * 128 + 16;

  // Shared memory of one stage of one warp: codes, x, scales, zeros.
  __host__ __device__ static int stage_bytes(int m, int scale_bytes, bool zeros) {
    return kWeightBytes + m * kPitch + kGrids * 16 * RW * (scale_bytes + (zeros ? 1 : 0));
  }

  const Small& p;
  const int lane, first_row;  // first_row: of this block
  char* const ring;
  const int bytes, grid_at;  // of a stage, and where its scales begin
  int x_at;                  // where this lane's part of x begins in a stage

  __device__ SmallKernel(const Small& task, char* memory, int warp)
      : p(task),
        lane(threadIdx.x % 32),
        first_row(blockIdx.x * 16 * RW),
        ring(memory + warp * task.warp_bytes),
        bytes(stage_bytes(task.m, task.scale_bytes, task.zeros != nullptr)),
        grid_at(kWeightBytes + task.m * kPitch) {
    // Rows beyond M only reach columns that nobody writes.
    x_at = kWeightBytes + min(lane / 4, task.m - 1) * kPitch + (UNIT == kSteps ? 0 : lane % 4 * 32);
  }

  // What a lane copies of the next unit, in pieces of 16 bytes: codes, x, and at most one piece of
  // the scales and one of the zeros.
  struct Source {
    const char* codes;
    const char* scales;    // of the unit's group, or of the first if UNIT is kSteps
    const uint8_t* zeros;  // likewise
    bool copies_scales, copies_zeros;
    int left;  // units of this group that are still to come
    const T* x;
    int place;  // of x
    uint64_t policy;
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
    const int group = UNIT == kSteps ? 0 : group_of(unit);
    const int64_t grid = static_cast<int64_t>(group) * p.scale_stride + first_row;
    s.scales =
        static_cast<const char*>(p.scales) + (grid << log) + (lane & ((RW << log) - 1)) * 16;
    s.zeros = p.zeros + grid + lane % RW * 16;
    s.copies_scales = lane >> (kLogRW + log) < kGrids;
    s.copies_zeros = p.zeros && lane >> kLogRW < kGrids;
    s.left = (group + 1) * p.runs_of_group - unit;
    s.place = unit * (kTiles * kSide) + lane % kPieces * 8;
    s.x = static_cast<const T*>(p.x) + (lane / kPieces * p.k + s.place);
    s.policy = evict_first();
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
          copy_once(to + kTileBytes * t + 512 * j, s.codes + at, s.policy);
        }
      }
    }
    s.codes += kTiles * 512 * BITS;
    const uint32_t zeros_to = to + grid_at + (kGrids * 16 * RW << scale_log());
    if constexpr (UNIT == kSteps) {
      if (s.copies_scales) {
        const int64_t row = group_of_step(unit, kLogRW + scale_log()) * p.scale_stride;
        copy(to + grid_at, s.scales + (row << scale_log()));
      }
      if (s.copies_zeros) {
        copy(zeros_to, s.zeros + group_of_step(unit, kLogRW) * p.scale_stride);
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

  using Sums = float[kTiles][RW][NT][4];
  using Ones = float[kTiles][NT][4];

  // Add scale * (code - zero) x of one grid to the totals, which stay in units of Raw.
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
            if (kTiles == 2) {
              all += sum[kTiles - 1][r][t][2 * h + i];
              of_x += ones[kTiles - 1][t][i];
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
  __device__ __forceinline__ void read_x(uint32_t (&b)[NT][8], const char* stage, int tile) const {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      int at = x_at;
      if (t == 1) {
        at += (min(8 + lane / 4, p.m - 1) - lane / 4) * kPitch;
      }
      const char* x = stage + at + tile * 128;
      if constexpr (UNIT == kSteps) {
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

  __device__ __forceinline__ void multiply(float (&total)[RW][NT][4], const char* stage) const {
    const uint32_t one = Pairs<T>::constant(1.0f), all_ones[4] = {one, one, one, one};
    Sums sum = {};
    Ones ones = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t b[NT][8];
      read_x(b, stage, tile);
      LaneCodes<BITS> codes[RW];
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        codes[r] = read_codes<BITS>(stage + kTileBytes * tile, r, RW, lane);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          mma<T>(ones[tile][t], all_ones, b[t][2 * s], b[t][2 * s + 1]);
        }
#pragma unroll
        for (int r = 0; r < RW; ++r) {
          uint32_t a[4];
          Raw<BITS, T>::operand(codes[r], s, a);
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(sum[tile][r][t], a, b[t][2 * s], b[t][2 * s + 1]);
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
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
      if (first + i < last) {
        copy_x(from, begin + i * bytes);
      }
      end_group();
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
      multiply(total, stage);
      __syncwarp();
      if (unit + STAGES < last) {
        copy_weight(from, unit + STAGES, slot);
        copy_x(from, slot);
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
  __device__ __forceinline__ void write(const char* memory, int warps) const {
    for (int e = threadIdx.x; e < 16 * RW * p.m; e += blockDim.x) {
      const int r = e % (16 * RW), m = e / (16 * RW), row = r % 16;
      const int fragment = r / 16 * NT + m / 8, from = row % 8 * 4 + m % 8 / 2;
      const int at = (fragment * 32 + from) * 4 + row / 8 * 2 + m % 2;
      float value = 0;
      for (int w = 0; w < warps; ++w) {
        value += reinterpret_cast<const float*>(memory + w * p.warp_bytes)[at];
      }
      const int n = first_row + r;
      if (n < p.n) {
        if (p.bias) {
          value += static_cast<float>(static_cast<const T*>(p.bias)[n]);
        }
        static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.n + n] = narrow<T>(value);
      }
    }
  }
};

template <int BITS, typename T, int NT, int RW, int STAGES, Unit UNIT>
__global__ void __launch_bounds__(512) q_small(const __grid_constant__ Small task) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, log = __ffs(warps) - 1;
  const SmallKernel<BITS, T, NT, RW, STAGES, UNIT> kernel(task, memory, warp);
  kernel.run_warp(task.units * warp >> log, task.units * (warp + 1) >> log);
  __syncthreads();
  kernel.write(memory, warps);
}

inline Small describe(const Product& product) {
  const Tiled& weight = product.weight;
  Small task{};
  task.tiles = weight.tiles;
  task.scales = weight.scales;
  task.zeros = weight.zeros;
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

inline void set_groups(Small& task, int64_t runs_of_group) {
  task.runs_of_group = static_cast<int32_t>(runs_of_group);
  task.group_of_run = static_cast<uint32_t>(((int64_t{1} << 32) + 2 * runs_of_group - 1) /
                                            (2 * runs_of_group));
}

template <int BITS, typename T, int NT, int RW, int STAGES, Unit UNIT>
const char* start_small(const Product& product, int warps, cudaStream_t stream) {
  using Kernel = SmallKernel<BITS, T, NT, RW, STAGES, UNIT>;
  Small task = describe(product);
  task.units = task.k_tiles / Kernel::kTiles;
  set_groups(task, product.weight.group_size / (UNIT == kPair ? 128 : task.run));
  const int stage = Kernel::stage_bytes(task.m, task.scale_bytes, task.zeros != nullptr);
  const int partial = RW * NT * 512;
  task.warp_bytes = STAGES * stage > partial ? STAGES * stage : partial;
  const Device& device = current_device();
  while (warps > 1 && warps * task.warp_bytes > device.shared_bytes) {
    warps /= 2;
  }
  const auto kernel = q_small<BITS, T, NT, RW, STAGES, UNIT>;
  return launch(kernel, task, task.scale_stride / (16 * RW), 32 * warps, warps * task.warp_bytes,
                stream);
}

template <int BITS, typename T, Unit UNIT>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  const int warps = config.warps;
  if (product.m > 8) {
    return start_small<BITS, T, 2, 2, 3, UNIT>(product, warps, stream);
  }
  // A lane copies one piece of the scales: too few for 64 outputs with 4 grids in fp32.
  if constexpr (UNIT != kSteps) {
    if (config.row_tiles == 4) {
      return start_small<BITS, T, 1, 4, BITS < 4 ? 3 : 2, UNIT>(product, warps, stream);
    }
  }
  return config.row_tiles == 1 ? start_small<BITS, T, 1, 1, 4, UNIT>(product, warps, stream)
                               : start_small<BITS, T, 1, 2, 4, UNIT>(product, warps, stream);
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

}  // namespace auto_gptq
