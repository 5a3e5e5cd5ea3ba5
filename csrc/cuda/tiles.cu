// Into tiles, and out of them into the dense weight.
#include <cuda_runtime.h>

#include "tiles.cuh"

namespace auto_gptq {
namespace {

__host__ __device__ int64_t tiles_of(int64_t size) { return (size + kSide - 1) / kSide; }

const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

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
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    uint32_t pairs[4];
    decode<BITS, __half>(codes, s, pairs);
    const int64_t place = k_tile * kSide + place_of(s, lane % 4, weight.run);
    if (place >= weight.k) {
      continue;
    }
    const int64_t group = place / weight.group_size;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = row + 8 * h, grid = group * n_stride + n;
      if (n >= n_end) {
        continue;
      }
      const float scale = load_scale(weight.scales, grid, weight.scale_type);
      const int middle = 1 << (BITS - 1);
      const float shift = weight.zeros ? middle - static_cast<int>(weight.zeros[grid]) : 0;
      const float2 first = Pairs<__half>::widen(pairs[h]), second = Pairs<__half>::widen(pairs[2 + h]);
      const float values[4] = {first.x, first.y, second.x, second.y};
      T* to = dense + (n - n_begin) * weight.k;
      T four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store(four + i, (values[i] + shift) * scale);
      }
      if (weight.perm) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[weight.perm[place + i]] = four[i];
        }
      } else {
        using Vector = typename std::conditional<sizeof(T) == 4, uint4, uint2>::type;
        *reinterpret_cast<Vector*>(to + place) = *reinterpret_cast<const Vector*>(four);
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
  return outcome();
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
  return outcome();
}
