// y = x W^T for a few dozen rows of x, on the tensor cores of sm_80 and later.
//
// A block of eight warps computes 256 outputs for ROWS rows of x, a warp 32 outputs: two row tiles,
// whose codes go from memory straight into its registers.  Arranged x (arrange.h) comes through
// shared memory, kStages tiles of 64 inputs ahead.  If there are fewer blocks than multiprocessors,
// several share the inputs; their sums are added in a fixed order by a second kernel.
#include <cuda_runtime.h>

#include <algorithm>

#include "arrange.h"
#include "device.h"
#include "mma.cuh"
#include "q_matmul.h"
#include "store.cuh"
#include "tiles.cuh"

namespace auto_gptq {
namespace {

constexpr int kThreads = 256;
constexpr int kRowTiles = 2;    // of a warp
constexpr int kColumns = 256;   // outputs of a block
constexpr int kStages = 4;      // tiles of x in shared memory

// What a lane has of one row tile in one tile: codes, and per span the grids of its two outputs.
template <int BITS, typename T, int SPANS>
struct Fetched {
  LaneCodes<BITS> codes;
  uint32_t scales[SPANS];  // of r0 and, in the upper half, of r1, in T
  uint32_t shifts[SPANS];  // likewise the middle code minus the zero

  __device__ __forceinline__ void fetch(
      const Tiled& w, int n_pad, int output, int k_tiles, int tile, int lane) {
    const int64_t at = static_cast<int64_t>(output / kSide) * k_tiles + tile;
    codes = load_codes<BITS>(w.tiles + at * (128 * BITS), output % kSide / 16, lane);
#pragma unroll
    for (int s = 0; s < SPANS; ++s) {
      const int input = tile * kSide + (SPANS == 1 ? 0 : place_of(s, 0, w.run));
      const int group =
          min(input / static_cast<int>(w.group_size), static_cast<int>(w.groups) - 1);
      const int64_t grid = static_cast<int64_t>(group) * n_pad + output + lane / 4;
      scales[s] = pack<T>(load_scale(w.scales, grid, w.scale_type),
                          load_scale(w.scales, grid + 8, w.scale_type));
      if (w.zeros) {
        const int middle = 1 << (BITS - 1);
        shifts[s] = pack<T>(middle - w.zeros[grid], middle - w.zeros[grid + 8]);
      }
    }
  }

  // The numbers of one step.
  __device__ __forceinline__ void numbers(int s, bool has_zeros, uint32_t (&a)[4]) const {
    decode<BITS, T>(codes, s, a);
    const uint32_t scale = scales[s * SPANS / 4];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const int twice_one = f % 2 == 0 ? 0x1010 : 0x3232;
      if (has_zeros) {
        a[f] = Pairs<T>::add(a[f], __byte_perm(shifts[s * SPANS / 4], 0, twice_one));
      }
      a[f] = Pairs<T>::fma(a[f], __byte_perm(scale, 0, twice_one), 0);
    }
  }
};

// The B operands of steps s and s + 1 for eight rows of x.
__device__ __forceinline__ void read_rows(uint32_t rows, int s, int lane, uint32_t (&b)[2][2]) {
  const uint32_t from = rows + lane % 8 * 128 + ((2 * s + lane / 8) ^ (lane % 8)) * 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0][0]), "=r"(b[0][1]), "=r"(b[1][0]), "=r"(b[1][1])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void store_part(const Product& p, float* part, int row, int output, const float (&four)[4]) {
  const int lane = threadIdx.x % 32, n = static_cast<int>(p.weight.n), m = static_cast<int>(p.m);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row + lane % 4 * 2 + i % 2;
    if (output < n && r < m) {
      part[static_cast<int64_t>(r) * n + output + lane / 4 + i / 2 * 8] = four[i];
    }
  }
}

template <int BITS, typename T, int ROWS, int SPANS>
__global__ void __launch_bounds__(kThreads, 2)
    q_mma(const __grid_constant__ Product p, float* parts) {  // parts [splits, M, N]
  constexpr int kBytes = ROWS * 128;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = static_cast<int>(p.weight.n), n_pad = (n + kSide - 1) / kSide * kSide;
  const int k_tiles = (static_cast<int>(p.weight.k) + kSide - 1) / kSide;
  const int begin = static_cast<int64_t>(k_tiles) * blockIdx.z / gridDim.z;
  const int end = static_cast<int64_t>(k_tiles) * (blockIdx.z + 1) / gridDim.z;
  const int output = blockIdx.x * kColumns + warp * kRowTiles * 16, row = blockIdx.y * ROWS;

  Fetched<BITS, T, SPANS> fetched[kRowTiles];
  const auto fetch = [&](int tile) {
    if (tile < end) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        fetched[i].fetch(p.weight, n_pad, min(output + 16 * i, n_pad - 16), k_tiles, tile,
                               lane);
      }
    }
  };
  const int64_t all_rows = arranged_rows(p.m);
  const int vectors = static_cast<int>(min(all_rows - row, int64_t{ROWS})) * 8;
  const auto* x = static_cast<const uint4*>(p.workspace) + row * 8;
  const auto copy = [&](int tile) {
    if (tile < end) {
      const uint32_t to = address + tile % kStages * kBytes;
#pragma unroll
      for (int i = threadIdx.x; i < ROWS * 8; i += kThreads) {
        if (i < vectors) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 16),
                       "l"(x + tile * all_rows * 8 + i)
                       : "memory");
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  fetch(begin);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    copy(begin + i);
  }

  float sums[kRowTiles][ROWS / 8][4] = {};
  for (int tile = begin; tile < end; ++tile) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    copy(tile + kStages - 1);
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        fetched[r].numbers(s, p.weight.zeros, a[r][0]);
        fetched[r].numbers(s + 1, p.weight.zeros, a[r][1]);
      }
      if (s == 2) {
        fetch(tile + 1);
      }
#pragma unroll
      for (int eight = 0; eight < ROWS / 8; ++eight) {
        uint32_t b[2][2];
        read_rows(address + tile % kStages * kBytes + eight * 1024, s, lane, b);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            mma<T>(sums[r][eight], a[r][j], b[j][0], b[j][1]);
          }
        }
      }
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");

  float* part = parts + static_cast<int64_t>(blockIdx.z) * p.m * n;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; ++eight) {
      if (gridDim.z > 1) {
        store_part(p, part, row + 8 * eight, output + 16 * r, sums[r][eight]);
      } else {
        const float* four = sums[r][eight];
        store_sums<T>(p, row + 8 * eight, output + 16 * r,
                      make_float4(four[0], four[1], four[2], four[3]));
      }
    }
  }
}

// y = the sum of the parts, in their order.
template <typename T>
__global__ void __launch_bounds__(256) add_parts(const __grid_constant__ Product p, const float* parts, int splits) {
  const int64_t size = p.m * p.weight.n, at = (blockIdx.x * int64_t{256} + threadIdx.x) * 4;
  if (at >= size) {
    return;
  }
  float4 sum = make_float4(0, 0, 0, 0);
  for (int s = 0; s < splits; ++s) {
    const float4 part = *reinterpret_cast<const float4*>(parts + s * size + at);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + at % p.weight.n;
    sum.x += static_cast<float>(bias[0]);
    sum.y += static_cast<float>(bias[1]);
    sum.z += static_cast<float>(bias[2]);
    sum.w += static_cast<float>(bias[3]);
  }
  *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + at) =
      make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
}

int rows_of_block(const Product& p) { return p.m <= 32 ? 32 : 64; }

// How many blocks share the inputs: as many as two per multiprocessor have room for.
int splits_of(const Product& p) {
  const int64_t k_tiles = (p.weight.k + kSide - 1) / kSide;
  const int64_t rows = rows_of_block(p);
  const int64_t blocks = (p.weight.n + kColumns - 1) / kColumns * ((p.m + rows - 1) / rows);
  return static_cast<int>(
      std::max<int64_t>(std::min({2 * current_device().processors / blocks, k_tiles / 8, int64_t{16}}), 1));
}

template <int BITS, typename T, int ROWS, int SPANS>
cudaError_t start(const Product& p, int splits, cudaStream_t stream) {
  const auto kernel = q_mma<BITS, T, ROWS, SPANS>;
  const int bytes = kStages * ROWS * 128;
  auto* parts = reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + arranged_bytes(p));
  const dim3 blocks(static_cast<unsigned>((p.weight.n + kColumns - 1) / kColumns),
                    static_cast<unsigned>((p.m + ROWS - 1) / ROWS), splits);
  kernel<<<blocks, kThreads, bytes, stream>>>(p, parts);
  if (splits > 1) {
    const auto quarters = static_cast<unsigned>((p.m * p.weight.n / 4 + 255) / 256);
    add_parts<T><<<quarters, 256, 0, stream>>>(p, parts, splits);
  }
  return cudaGetLastError();
}

template <int BITS, typename T>
cudaError_t start_rows(const Product& p, int rows, int splits, cudaStream_t stream) {
  if (p.weight.run == kSide) {
    return rows == 32 ? start<BITS, T, 32, 1>(p, splits, stream)
                      : start<BITS, T, 64, 1>(p, splits, stream);
  }
  return rows == 32 ? start<BITS, T, 32, 4>(p, splits, stream)
                    : start<BITS, T, 64, 4>(p, splits, stream);
}

template <typename T>
cudaError_t start_bits(const Product& p, int rows, int splits, cudaStream_t stream) {
  switch (p.weight.bits) {
    case 2:
      return start_rows<2, T>(p, rows, splits, stream);
    case 3:
      return start_rows<3, T>(p, rows, splits, stream);
    case 4:
      return start_rows<4, T>(p, rows, splits, stream);
    default:
      return start_rows<8, T>(p, rows, splits, stream);
  }
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cuda_q_mma_bytes(const Product* product) {
  const int splits = splits_of(*product);
  return arranged_bytes(*product) + (splits > 1 ? splits * product->m * product->weight.n * 4 : 0);
}

const char* auto_gptq_cuda_q_mma(const Product* product, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const char* failure = arrange(*product, on);
  if (failure) {
    return failure;
  }
  const int rows = rows_of_block(*product), splits = splits_of(*product);
  return outcome(product->type == kFloat16
                     ? start_bits<__half>(*product, rows, splits, on)
                     : start_bits<__nv_bfloat16>(*product, rows, splits, on));
}
