// What the kernels for experts share: which rows a block takes, and how it reads a weight.
#pragma once

#include <cuda_runtime.h>

#include "../experts.h"
#include "device.h"
#include "mma.cuh"
#include "raw.cuh"
#include "tiles.cuh"

namespace auto_gptq {

struct Grouped {
  const uint32_t* tiles;
  const void* scales;
  const uint8_t* zeros;
  const void* x;  // in the order of the tiles
  const int32_t* rows;
  const int32_t* offsets;
  const void* bias;
  void* y;
  int64_t tile_words;  // of an expert
  int64_t grids;       // G N', of an expert
  int32_t experts, m, k, n;
  int32_t n_pad;          // N'
  int32_t k_tiles;        // K' / 64
  int32_t groups;         // G
  int32_t run;            // 16, 32 or 64 places that share a scale
  uint32_t group_of_run;  // multiplier: run r is in group umulhi(2 r + 1, group_of_run)
  int32_t parts;          // blocks that share out the rows
  DataType scale_type;
};

// Rows of one expert, at most as many as a block takes.
struct Part {
  int32_t expert;  // E: nobody's rows
  int32_t first;
  int32_t count;  // 0: there is no such part
};

// Find the part with a number.  Every warp does so for itself; experts are shared out among lanes.
__device__ __forceinline__ Part find_part(const Grouped& p, int size, int index) {
  const int lane = threadIdx.x % 32, all = p.experts + 1, per_lane = (all + 31) / 32;
  const int begin = min(lane * per_lane, all), end = min(begin + per_lane, all);
  const auto stop = [&](int e) { return e < p.experts ? p.offsets[e + 1] : p.m; };
  const auto parts = [&](int e) { return (stop(e) - p.offsets[e] + size - 1) / size; };
  int own = 0;
#pragma unroll 4
  for (int e = begin; e < end; ++e) {
    own += parts(e);
  }
  int through = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, through, step);
    through += lane >= step ? before : 0;
  }
  const uint32_t reached = __ballot_sync(~0u, index < through);
  if (reached == 0) {
    return {0, 0, 0};
  }
  const int owner = __ffs(reached) - 1;
  int e = begin, left = index - (through - own), first = 0, count = 0;
  if (lane == owner) {
    for (int n = parts(e); left >= n; n = parts(++e)) {
      left -= n;
    }
    first = p.offsets[e] + left * size;
    count = min(stop(e) - first, size);
  }
  return {__shfl_sync(~0u, e, owner), __shfl_sync(~0u, first, owner),
          __shfl_sync(~0u, count, owner)};
}

__device__ __forceinline__ int group_of(const Grouped& p, int run) {
  return min(static_cast<int>(__umulhi(2 * run + 1, p.group_of_run)), p.groups - 1);
}

// The bits of a scale as they lie: to make a number of them would wait for them.
__device__ __forceinline__ uint32_t scale_bits(const Grouped& p, int64_t at) {
  return p.scale_type == kFloat32 ? static_cast<const uint32_t*>(p.scales)[at]
                                  : static_cast<const uint16_t*>(p.scales)[at];
}

__device__ __forceinline__ float widen_scale(const Grouped& p, uint32_t bits) {
  if (p.scale_type == kFloat16) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }
  return __uint_as_float(p.scale_type == kBFloat16 ? bits << 16 : bits);
}

// The weights of one step, of outputs 8 apart: scale * (code - zero), rounded to T.
template <int BITS, typename T>
__device__ __forceinline__ void scaled_weights(const Grouped& p,
                                               const LaneCodes<BITS>& codes,
                                               int step,
                                               const uint32_t (&scale)[2],  // as they lie
                                               const uint32_t (&zero)[2],
                                               uint32_t (&a)[4]) {
  decode<BITS, T>(codes, step, a);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t both = Pairs<T>::constant(widen_scale(p, scale[i]));
    if (p.zeros) {
      const int shift = (1 << (BITS - 1)) - static_cast<int>(zero[i]);
      const uint32_t add = Pairs<T>::constant(static_cast<float>(shift));
      a[i] = Pairs<T>::add(a[i], add);
      a[i + 2] = Pairs<T>::add(a[i + 2], add);
    }
    a[i] = Pairs<T>::fma(a[i], both, 0);
    a[i + 2] = Pairs<T>::fma(a[i + 2], both, 0);
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// An 8 x 8 matrix of 16-bit numbers, two per lane.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Put zeros where rows belong to nobody.
template <typename T>
__device__ __forceinline__ void clear_rows(const Grouped& p, Part part, int output, int width) {
  for (int i = threadIdx.x; i < width * part.count; i += blockDim.x) {
    const int n = output + i % width;
    if (n < p.n) {
      static_cast<T*>(p.y)[static_cast<int64_t>(part.first + i / width) * p.n + n] =
          narrow<T>(0.0f);
    }
  }
}

// How many blocks are enough for any distribution of the rows.
inline int64_t most_parts(const Experts& task, int64_t size) {
  const int64_t owners = std::min(task.experts + 1, task.m);
  return std::min(task.m, (task.m + owners * (size - 1)) / size);
}

inline Grouped describe(const Experts& task, int64_t size) {
  const Tiled& weight = task.weight;
  Grouped made{};
  made.tiles = weight.tiles;
  made.scales = weight.scales;
  made.zeros = weight.zeros;
  made.x = task.x;
  made.rows = task.rows;
  made.offsets = task.offsets;
  made.bias = task.bias;
  made.y = task.y;
  made.experts = static_cast<int32_t>(task.experts);
  made.m = static_cast<int32_t>(task.m);
  made.k = static_cast<int32_t>(weight.k);
  made.n = static_cast<int32_t>(weight.n);
  made.n_pad = (made.n + kSide - 1) / kSide * kSide;
  made.k_tiles = (made.k + kSide - 1) / kSide;
  made.groups = static_cast<int32_t>(weight.groups);
  made.tile_words = int64_t{made.n_pad} / kSide * made.k_tiles * 128 * weight.bits;
  made.grids = int64_t{made.groups} * made.n_pad;
  made.run = weight.run;
  const int64_t runs = weight.group_size / weight.run;
  made.group_of_run = static_cast<uint32_t>(((int64_t{1} << 32) + 2 * runs - 1) / (2 * runs));
  made.parts = static_cast<int32_t>(most_parts(task, size));
  made.scale_type = weight.scale_type;
  return made;
}

}  // namespace auto_gptq
