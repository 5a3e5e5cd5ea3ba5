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
  int32_t groups;         // G
  int32_t run;            // 16, 32 or 64 places that share a scale
  int32_t runs_of_group;
  uint32_t group_of_run;  // multiplier: run r is in group umulhi(2 r + 1, group_of_run)
  int32_t scale_bytes;    // 2 or 4
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

// NT: 8 rows of x each.  STAGES: tiles in the ring.  WHOLE: a tile never holds two groups.
template <int BITS, typename T, int NT, int RW, int STAGES, bool WHOLE>
struct SmallKernel {
  static constexpr int kRuns = WHOLE ? 1 : 4;  // of a tile, each with scales of its own
  static constexpr int kWeightBytes = RW * 128 * BITS;
  // A chain of dependent products is long; one warp with little else to do keeps two.
  static constexpr int kSplit = WHOLE && RW * NT == 1 ? 2 : 1;

  // Shared memory of one stage of one warp: codes, then scales, then zeros of each run.
  __host__ __device__ static int stage_bytes(int scale_bytes, bool zeros) {
    return kWeightBytes + kRuns * 16 * RW * (scale_bytes + (zeros ? 1 : 0));
  }

  const Small& p;
  const int lane, first_row;  // first_row: of this block
  char* const warp_memory;
  const int bytes;  // of a stage

  __device__ SmallKernel(const Small& task, char* memory, int warp)
      : p(task),
        lane(threadIdx.x % 32),
        first_row(blockIdx.x * 16 * RW),
        warp_memory(memory + warp * task.warp_bytes),
        bytes(stage_bytes(task.scale_bytes, task.zeros != nullptr)) {}

  __device__ __forceinline__ char* x_memory() const { return warp_memory + STAGES * bytes; }

  // What a lane copies of every tile, in pieces of 16 bytes: codes, and at most one piece of the
  // scales and one of the zeros, of group 0 here.
  struct Source {
    const char* codes;
    const char* scales;  // null if this lane copies none
    const uint8_t* zeros;
    int scale_run, zero_run;  // of the tile's runs
    uint64_t policy;
  };

  __device__ __forceinline__ Source source() const {
    constexpr int kLog = RW == 4 ? 2 : RW / 2;  // of RW
    const int row_tile = first_row / 16 % 4, scale_log = p.scale_bytes == 4 ? 2 : 1;
    Source s;
    s.codes = reinterpret_cast<const char*>(p.tiles) +
              static_cast<int64_t>(first_row / kSide) * p.k_tiles * (512 * BITS) +
              (BITS == 3 ? row_tile * 256 : row_tile * 128 * BITS) + 16 * lane;
    s.scale_run = lane >> (kLog + scale_log);
    s.scales = static_cast<const char*>(p.scales) + (first_row << scale_log) +
               (lane & ((RW << scale_log) - 1)) * 16;
    s.scales = s.scale_run < kRuns ? s.scales : nullptr;
    s.zero_run = lane >> kLog;
    s.zeros = p.zeros && s.zero_run < kRuns ? p.zeros + first_row + lane % RW * 16 : nullptr;
    s.policy = evict_first();
    return s;
  }

  __device__ __forceinline__ int group_of(int run) const {
    return min(static_cast<int>(__umulhi(2 * run + 1, p.group_of_run)), p.groups - 1);
  }

  // The group of a tile's step.
  __device__ __forceinline__ int group_at(int k_tile, int step) const {
    return group_of(WHOLE ? k_tile : (4 * k_tile + step) / (p.run / 16));
  }

  __device__ __forceinline__ void copy_tile(const Source& s, int k_tile, uint32_t to) const {
    const char* codes = s.codes + static_cast<int64_t>(k_tile) * (512 * BITS);
    constexpr int kPieces = kWeightBytes / 16;
#pragma unroll
    for (int j = 0; j < (kPieces + 31) / 32; ++j) {
      const int i = lane + 32 * j;
      int64_t at = 512 * j;
      if constexpr (BITS == 3) {  // the plane of the highest bits lies further on
        if (i >= RW * 16) {
          at += 1024 - RW * 256 - first_row / 16 % 4 * 128;
        }
      }
      if (kPieces % 32 == 0 || i < kPieces) {
        copy_once(to + 16 * i, codes + at, s.policy);
      }
    }
    if (s.scales) {
      const int64_t row = static_cast<int64_t>(group_at(k_tile, s.scale_run)) * p.scale_stride;
      copy(to + kWeightBytes + 16 * lane, s.scales + row * p.scale_bytes);
    }
    if (s.zeros) {
      const int64_t row = static_cast<int64_t>(group_at(k_tile, s.zero_run)) * p.scale_stride;
      copy(to + kWeightBytes + kRuns * 16 * RW * p.scale_bytes + 16 * lane, s.zeros + row);
    }
  }

  // Tiles whose x is in shared memory at a time.
  __host__ __device__ static constexpr int chunk_tiles(int m) { return m == 1 ? 16 : m == 2 ? 8 : 4; }
  __host__ __device__ static constexpr int x_pitch(int m) { return chunk_tiles(m) * 128 + 16; }

  // Bring x of a chunk of tiles, places before `end`, into shared memory: of one row, each lane
  // copies 8 places in every 4 tiles.
  __device__ __forceinline__ void copy_x(int k_tile, int end) const {
    constexpr int kAtOnce = 4;
    const int first = k_tile * kSide + lane * 8;
    const T* x = static_cast<const T*>(p.x) + first;
    char* to = x_memory() + lane * 16;
    const int unit_log = p.m == 1 ? 0 : p.m == 2 ? 1 : 30, copies = p.m <= 2 ? kAtOnce : p.m;
    for (int base = 0; base < copies; base += kAtOnce) {
      uint4 v[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j, unit = i >> unit_log, row = i - (unit << unit_log);
        v[j] = make_uint4(0, 0, 0, 0);
        if (i < copies && first + unit * 256 < end) {
          v[j] = *reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row) * p.k + unit * 256);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j, unit = i >> unit_log, row = i - (unit << unit_log);
        if (i < copies) {
          *reinterpret_cast<uint4*>(to + row * x_pitch(p.m) + unit * 512) = v[j];
        }
      }
    }
  }

  // Add scale * (code - zero) x of one run to the totals.
  __device__ __forceinline__ void fold(float (&total)[RW][NT][4],
                                       float (&sum)[kSplit][RW][NT][4],
                                       float (&ones)[kSplit][NT][4],
                                       const char* stage,
                                       int run) const {
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (run * RW + r) * 16 + h * 8 + lane / 4;
        const float scale = load_scale(stage + kWeightBytes, at, p.scale_type);
        float zero = 1 << (BITS - 1);
        if (p.zeros) {
          const char* zeros = stage + kWeightBytes + kRuns * 16 * RW * p.scale_bytes;
          zero = static_cast<float>(reinterpret_cast<const uint8_t*>(zeros)[at]);
        }
        const float unit = Raw<BITS, T>::unit(h), factor = scale * (1.0f / unit);
        const float taken = -(Raw<BITS, T>::base() + unit * zero);
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            float exact = sum[0][r][t][i] + taken * ones[0][t][i];
            if (kSplit == 2) {
              exact += sum[kSplit - 1][r][t][i] + taken * ones[kSplit - 1][t][i];
            }
            total[r][t][i] += factor * exact;
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSplit; ++s) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ones[s][t][i] = 0;
#pragma unroll
          for (int r = 0; r < RW; ++r) {
            sum[s][r][t][i] = 0;
          }
        }
      }
    }
  }

  // Give the B operands of a tile's four steps.
  __device__ __forceinline__ void read_x(uint32_t (&b)[NT][8], int tile_of_chunk) const {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      // Rows beyond M only reach columns that nobody writes.
      const int row = min(t * 8 + lane / 4, p.m - 1);
      const char* x = x_memory() + row * x_pitch(p.m) + tile_of_chunk * 128;
      if constexpr (WHOLE) {
        const uint4* from = reinterpret_cast<const uint4*>(x + lane % 4 * 32);
        const uint4 u = from[0], v = from[1];
        b[t][0] = u.x, b[t][1] = u.y, b[t][2] = u.z, b[t][3] = u.w;
        b[t][4] = v.x, b[t][5] = v.y, b[t][6] = v.z, b[t][7] = v.w;
      } else {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint2 u = *reinterpret_cast<const uint2*>(x + 2 * place_of(s, lane % 4, p.run));
          b[t][2 * s] = u.x, b[t][2 * s + 1] = u.y;
        }
      }
    }
  }

  __device__ __forceinline__ void run_warp(int first_tile, int last_tile) const {
    let_next_kernel_start();
    const Source from = source();
    const uint32_t ring = shared_address(warp_memory), ring_end = ring + STAGES * bytes;
    uint32_t slot = ring;
#pragma unroll 1
    for (int tile = first_tile; tile < first_tile + STAGES; ++tile, slot += bytes) {
      if (tile < last_tile) {
        copy_tile(from, tile, slot);
      }
      end_group();
    }
    wait_for_previous_kernel();
    const uint32_t one = Pairs<T>::constant(1.0f), all_ones[4] = {one, one, one, one};
    float total[RW][NT][4] = {}, sum[kSplit][RW][NT][4] = {}, ones[kSplit][NT][4] = {};
    slot = ring;
    const char* stage = warp_memory;
    int left = WHOLE ? (group_of(first_tile) + 1) * p.runs_of_group - first_tile : 0;
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; ++tile) {
      const int of_chunk = (tile - first_tile) & (chunk_tiles(p.m) - 1);
      if (of_chunk == 0) {
        __syncwarp();
        copy_x(tile, min(last_tile * kSide, p.k));
      }
      wait_for_groups<STAGES - 1>();
      __syncwarp();
      LaneCodes<BITS> codes[RW];
#pragma unroll
      for (int r = 0; r < RW; ++r) {
        codes[r] = read_codes<BITS>(stage, r, RW, lane);
      }
      uint32_t b[NT][8];
      read_x(b, of_chunk);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          mma<T>(ones[s % kSplit][t], all_ones, b[t][2 * s], b[t][2 * s + 1]);
        }
#pragma unroll
        for (int r = 0; r < RW; ++r) {
          uint32_t a[4];
          Raw<BITS, T>::operand(codes[r], s, a);
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            mma<T>(sum[s % kSplit][r][t], a, b[t][2 * s], b[t][2 * s + 1]);
          }
        }
        if (!WHOLE) {
          fold(total, sum, ones, stage, s);
        }
      }
      if (WHOLE && (--left == 0 || tile + 1 == last_tile)) {
        fold(total, sum, ones, stage, 0);
        left = p.runs_of_group;
      }
      __syncwarp();
      if (tile + STAGES < last_tile) {
        copy_tile(from, tile + STAGES, slot);
      }
      end_group();
      slot += bytes;
      stage += bytes;
      if (slot == ring_end) {
        slot = ring;
        stage = warp_memory;
      }
    }
    wait_for_groups<0>();
    __syncwarp();
    float4* mine = reinterpret_cast<float4*>(warp_memory);
#pragma unroll
    for (int r = 0; r < RW; ++r) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const float* v = total[r][t];
        mine[(r * NT + t) * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
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

template <int BITS, typename T, int NT, int RW, int STAGES, bool WHOLE>
__global__ void __launch_bounds__(512) q_small(const __grid_constant__ Small task) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, log = __ffs(warps) - 1;
  const SmallKernel<BITS, T, NT, RW, STAGES, WHOLE> kernel(task, memory, warp);
  kernel.run_warp(task.k_tiles * warp >> log, task.k_tiles * (warp + 1) >> log);
  __syncthreads();
  kernel.write(memory, warps);
}

inline Small describe(const Product& product) {
  const Tiled& weight = product.weight;
  const int64_t runs = weight.group_size / weight.run;
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
  task.runs_of_group = static_cast<int32_t>(runs);
  task.group_of_run = static_cast<uint32_t>(((int64_t{1} << 32) + 2 * runs - 1) / (2 * runs));
  task.scale_bytes = weight.scale_type == kFloat32 ? 4 : 2;
  task.scale_type = weight.scale_type;
  return task;
}

template <int BITS, typename T, int NT, int RW, int STAGES, bool WHOLE>
const char* start_small(const Product& product, int warps, cudaStream_t stream) {
  using Kernel = SmallKernel<BITS, T, NT, RW, STAGES, WHOLE>;
  Small task = describe(product);
  const int ring = STAGES * Kernel::stage_bytes(task.scale_bytes, task.zeros != nullptr);
  const int bytes = ring + task.m * Kernel::x_pitch(task.m), partial = RW * NT * 512;
  task.warp_bytes = (bytes > partial ? bytes : partial) + 15 & ~15;
  const Device& device = current_device();
  while (warps > 1 && warps * task.warp_bytes > device.shared_bytes) {
    warps /= 2;
  }
  const auto kernel = q_small<BITS, T, NT, RW, STAGES, WHOLE>;
  return launch(kernel, task, task.scale_stride / (16 * RW), 32 * warps, warps * task.warp_bytes,
                stream);
}

template <int BITS, typename T, bool WHOLE>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  if (product.m > 8) {
    // A lane copies one piece of the scales: too few for 64 outputs with 4 runs in fp32.
    return config.row_tiles == 4 && WHOLE
               ? start_small<BITS, T, 2, 4, 4, WHOLE>(product, config.warps, stream)
               : start_small<BITS, T, 2, 2, 4, WHOLE>(product, config.warps, stream);
  }
  return config.row_tiles == 1 ? start_small<BITS, T, 1, 1, 8, WHOLE>(product, config.warps, stream)
                               : start_small<BITS, T, 1, 2, 8, WHOLE>(product, config.warps, stream);
}

template <int BITS>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  const bool whole = product.weight.run == kSide;
  if (product.type == kFloat16) {
    return whole ? start_small<BITS, __half, true>(product, config, stream)
                 : start_small<BITS, __half, false>(product, config, stream);
  }
  return whole ? start_small<BITS, __nv_bfloat16, true>(product, config, stream)
               : start_small<BITS, __nv_bfloat16, false>(product, config, stream);
}

}  // namespace auto_gptq
