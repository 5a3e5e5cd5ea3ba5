// Into tiles, and out of them into the dense weight.
#include <cuda_runtime.h>

#include "device.h"
#include "tiles.cuh"

namespace auto_gptq {
namespace {

__host__ __device__ int64_t tiles_of(int64_t size) { return (size + kSide - 1) / kSide; }

template <int BITS>
__device__ uint32_t packed_code(const int32_t* qweight, int64_t n_stride, int64_t k, int64_t n) {
  const int bit = static_cast<int>(k % 32) * BITS, shift = bit % 32;
  const int32_t* word = qweight + (k / 32 * BITS + bit / 32) * n_stride + n;
  uint32_t code = static_cast<uint32_t>(word[0]) >> shift;
  if (32 % BITS != 0 && shift + BITS > 32) {
    code |= static_cast<uint32_t>(word[n_stride]) << (32 - shift);
  }
  return code & ((1u << BITS) - 1);
}

// Where a lane keeps the code of step s, input i, output h (r0 or r1): plane by plane, see tiles.py.
template <int BITS>
__device__ void put(LaneCodes<BITS>& codes, uint32_t code, int s, int i, int h) {
  const int half = i % 2 * 16, pair = s * 4 + i / 2 * 2 + h;
  if constexpr (BITS == 4 || BITS == 8) {
    constexpr int kFields = 16 / BITS;
    codes.word[pair / kFields] |= code << (half + pair % kFields * BITS);
  } else {
    codes.word[pair / 8] |= (code & 3) << (half + pair % 8 * 2);
    if constexpr (BITS == 3) {
      const int field = pair % 8;
      codes.word[2] |= (code >> 2) << (half + (2 + field % 4 * 2 + field / 4 + pair / 8 * 8) % 16);
    }
  }
}

template <int BITS>
__device__ void store_codes(const LaneCodes<BITS>& codes, uint32_t* tile, int row_tile, int lane) {
  constexpr int kVector = BITS == 3 ? 2 : BITS < 4 ? BITS : 4;
#pragma unroll
  for (int w = 0; w < (BITS == 3 ? 2 : BITS); ++w) {
    const int vector = row_tile * (BITS == 3 ? 1 : BITS / kVector) + w / kVector;
    tile[(vector * 32 + lane) * kVector + w % kVector] = codes.word[w];
  }
  if constexpr (BITS == 3) {
    tile[256 + row_tile * 32 + lane] = codes.word[2];
  }
}

// A block of 4 warps makes one tile, a warp one row tile of it.
template <int BITS>
__global__ void __launch_bounds__(128) repack(const int32_t* qweight, Tiled weight) {
  const int lane = threadIdx.x % 32, row_tile = threadIdx.x / 32;
  const int64_t k_tile = blockIdx.x % tiles_of(weight.k), n_tile = blockIdx.x / tiles_of(weight.k);
  LaneCodes<BITS> codes{};
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t place = k_tile * kSide + place_of(s, lane % 4, weight.run) + i;
      if (place < weight.k) {
        const int64_t k = weight.perm ? weight.perm[place] : place;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t n = n_tile * kSide + row_tile * 16 + h * 8 + lane / 4;
          if (n < weight.n) {
            put<BITS>(codes, packed_code<BITS>(qweight, weight.n, k, n), s, i, h);
          }
        }
      }
    }
  }
  uint32_t* tile = const_cast<uint32_t*>(weight.tiles) + blockIdx.x * int64_t{128 * BITS};
  store_codes<BITS>(codes, tile, row_tile, lane);
}

template <typename T>
__device__ void store(T* to, float value) {
  if constexpr (sizeof(T) == 4) {
    *to = value;
  } else if constexpr (Pairs<T>::kMantissa == 10) {
    *to = __float2half_rn(value);
  } else {
    *to = __float2bfloat16_rn(value);
  }
}

// Write 16 numbers of a row, 8 words that begin where lane q of the four lanes of the row says; two
// lanes next to each other swap halves first, so that together they write whole sectors of 32 bytes.
__device__ void store_run(uint16_t* row, const uint32_t (&v)[8], int lane, bool exists) {
  const bool odd = lane % 2;
  uint32_t got[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    got[i] = __shfl_xor_sync(0xffffffff, odd ? v[i] : v[4 + i], 1);
  }
  if (exists) {
    uint4* to = reinterpret_cast<uint4*>(row + lane % 4 / 2 * 32 + odd * 8);
    to[0] = odd ? make_uint4(got[0], got[1], got[2], got[3]) : make_uint4(v[0], v[1], v[2], v[3]);
    to[2] = odd ? make_uint4(v[4], v[5], v[6], v[7]) : make_uint4(got[0], got[1], got[2], got[3]);
  }
}

// A block of 4 warps writes one tile, a warp one row tile of it.
template <int BITS, typename T>
__global__ void __launch_bounds__(128)
    dequantize(Tiled weight, int64_t n_begin, int64_t n_end, T* dense) {  // [n_end - n_begin, K]
  const int lane = threadIdx.x % 32, row_tile = threadIdx.x / 32;
  const int64_t k_tiles = tiles_of(weight.k), n_stride = tiles_of(weight.n) * kSide;
  const int64_t k_tile = blockIdx.x % k_tiles, n_tile = n_begin / kSide + blockIdx.x / k_tiles;
  const uint32_t* tile = weight.tiles + (n_tile * k_tiles + k_tile) * (128 * BITS);
  const LaneCodes<BITS> codes = load_codes<BITS>(tile, row_tile, lane);
  const int64_t row = n_tile * kSide + row_tile * 16 + lane / 4;
  uint32_t pairs[4][4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    decode<BITS, __half>(codes, s, pairs[s]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t n = row + 8 * h;
    T* to = dense + (n - n_begin) * weight.k;
    T values[16];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t place = k_tile * kSide + place_of(s, lane % 4, weight.run);
      const int64_t group = min(place / weight.group_size, weight.groups - 1);
      const int64_t grid = group * n_stride + n;
      const float scale = load_scale(weight.scales, grid, weight.scale_type);
      const int middle = 1 << (BITS - 1);
      const float shift = weight.zeros ? middle - static_cast<int>(weight.zeros[grid]) : 0;
      const float2 first = Pairs<__half>::widen(pairs[s][h]);
      const float2 second = Pairs<__half>::widen(pairs[s][2 + h]);
      store(values + 4 * s, (first.x + shift) * scale);
      store(values + 4 * s + 1, (first.y + shift) * scale);
      store(values + 4 * s + 2, (second.x + shift) * scale);
      store(values + 4 * s + 3, (second.y + shift) * scale);
    }
    if (sizeof(T) == 2 && weight.run == kSide && !weight.perm) {
      const bool exists = n < n_end && k_tile * kSide + lane % 4 * 16 < weight.k;
      store_run(reinterpret_cast<uint16_t*>(to) + k_tile * kSide,
                reinterpret_cast<const uint32_t(&)[8]>(values), lane, exists);
      continue;
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t place = k_tile * kSide + place_of(s, lane % 4, weight.run);
      if (n >= n_end || place >= weight.k) {
        continue;
      }
      if (weight.perm) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[weight.perm[place + i]] = values[4 * s + i];
        }
      } else {
        using Vector = typename std::conditional<sizeof(T) == 4, uint4, uint2>::type;
        *reinterpret_cast<Vector*>(to + place) = *reinterpret_cast<const Vector*>(values + 4 * s);
      }
    }
  }
}

template <int BITS>
void start_dequantize(const Tiled& weight,
                      int64_t n_begin,
                      int64_t n_end,
                      void* dense,
                      DataType type,
                      cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tiles_of(n_end - n_begin) * tiles_of(weight.k));
  if (type == kFloat32) {
    dequantize<BITS><<<blocks, 128, 0, stream>>>(weight, n_begin, n_end,
                                                 static_cast<float*>(dense));
  } else if (type == kFloat16) {
    dequantize<BITS><<<blocks, 128, 0, stream>>>(weight, n_begin, n_end,
                                                 static_cast<__half*>(dense));
  } else {
    dequantize<BITS><<<blocks, 128, 0, stream>>>(weight, n_begin, n_end,
                                                 static_cast<__nv_bfloat16*>(dense));
  }
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_repack_tiles(const int32_t* qweight, const Tiled* weight, void* stream) {
  const auto blocks = static_cast<unsigned>(tiles_of(weight->n) * tiles_of(weight->k));
  const auto on = static_cast<cudaStream_t>(stream);
  switch (weight->bits) {
    case 2:
      repack<2><<<blocks, 128, 0, on>>>(qweight, *weight);
      break;
    case 3:
      repack<3><<<blocks, 128, 0, on>>>(qweight, *weight);
      break;
    case 4:
      repack<4><<<blocks, 128, 0, on>>>(qweight, *weight);
      break;
    default:
      repack<8><<<blocks, 128, 0, on>>>(qweight, *weight);
  }
  return outcome(cudaGetLastError());
}

const char* auto_gptq_cuda_dequantize_tiles(const Tiled* weight,
                                            int64_t n_begin,
                                            int64_t n_end,
                                            void* dense,
                                            DataType type,
                                            void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (weight->bits) {
    case 2:
      start_dequantize<2>(*weight, n_begin, n_end, dense, type, on);
      break;
    case 3:
      start_dequantize<3>(*weight, n_begin, n_end, dense, type, on);
      break;
    case 4:
      start_dequantize<4>(*weight, n_begin, n_end, dense, type, on);
      break;
    default:
      start_dequantize<8>(*weight, n_begin, n_end, dense, type, on);
  }
  return outcome(cudaGetLastError());
}
