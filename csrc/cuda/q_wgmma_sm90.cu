// y = x W^T for more than a few rows of x, on the tensor cores of Hopper.
//
// A block computes 256 outputs for ROWS rows of x: the transposed product, so that the weight is the
// operand that comes from registers, where its codes become numbers.  Two warps of producers keep a
// ring of stages full, a stage being 64 inputs of arranged x (arrange.h), tiles and grids.  Four
// warpgroups of consumers have 64 outputs each: while one's products run, others decode.
//
// If there are fewer blocks than multiprocessors, a cluster of 2, 4 or 8 blocks shares the inputs,
// and each block adds up its part of the rows, always in the same order.
#include <cuda_runtime.h>

#include <algorithm>

#include "arrange.h"
#include "device.h"
#include "hopper.cuh"
#include "mma.cuh"
#include "q_matmul.h"
#include "tiles.cuh"

namespace auto_gptq {
namespace {

using namespace hopper;

constexpr int kColumns = 256;    // outputs of a block
constexpr int kConsumers = 512;  // threads
constexpr int kProducers = 128;  // a warpgroup, to give its registers away; two warps work
constexpr int kThreads = kConsumers + kProducers;
constexpr int kSharedBytes = 226 << 10;

// Where things lie in shared memory.  SPANS is how many groups may meet in a stage, 1 or 4.
template <int BITS, int ROWS, int SPANS>
struct Ring {
  static constexpr int kX = ROWS * 128;
  static constexpr int kTile = 512 * BITS;
  static constexpr int kStage = kX + kColumns / kSide * kTile;
  static constexpr int kZeros = SPANS * kColumns * 4;  // scales have up to 4 bytes
  static constexpr int kGrids = kZeros + SPANS * kColumns;
  static constexpr int kStages = std::min((kSharedBytes - 1024) / (kStage + kGrids), 12);
  static constexpr int kBytes = 1024 + kStages * (kStage + kGrids);
  static_assert(kStage % 1024 == 0);
};

struct Place {
  int m, n;  // the first row of x and the first output of a block
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (Pairs<T>::kMantissa == 10) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> read_codes(const uint8_t* tile, int row_tile, int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 2 || BITS == 3) {
    const uint2 v = reinterpret_cast<const uint2*>(tile)[row_tile * 32 + lane];
    codes.word[0] = v.x;
    codes.word[1] = v.y;
    if constexpr (BITS == 3) {
      codes.word[2] = reinterpret_cast<const uint32_t*>(tile)[256 + row_tile * 32 + lane];
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(tile)[(row_tile * (BITS / 4) + i) * 32 + lane];
      codes.word[4 * i] = v.x;
      codes.word[4 * i + 1] = v.y;
      codes.word[4 * i + 2] = v.z;
      codes.word[4 * i + 3] = v.w;
    }
  }
  return codes;
}

// A position in the ring, and the parity of its rounds.
template <int STAGES>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int BITS, typename T, int ROWS, int SPANS>
struct Block {
  using R = Ring<BITS, ROWS, SPANS>;
  const Product& p;
  uint8_t* ring;
  uint32_t address, full, empty;  // of the ring and of its barriers, in shared memory
  int k_begin, k_end;             // the cluster's block has these tiles of the inputs

  // Computed where they are needed: registers are scarce.
  __device__ __forceinline__ int m() const { return static_cast<int>(p.m); }
  __device__ __forceinline__ int n() const { return static_cast<int>(p.weight.n); }
  __device__ __forceinline__ int n_pad() const { return (n() + kSide - 1) / kSide * kSide; }
  __device__ __forceinline__ int k_tiles() const {
    return (static_cast<int>(p.weight.k) + kSide - 1) / kSide;
  }
  __device__ __forceinline__ int m_blocks() const { return (m() + ROWS - 1) / ROWS; }
  __device__ __forceinline__ int n_blocks() const { return (n() + kColumns - 1) / kColumns; }

  // Blocks that run together share rows of x and tiles: eight of them take the same outputs.
  __device__ __forceinline__ Place place_of(int index) const {
    const int band = index / (8 * n_blocks()), inside = index % (8 * n_blocks());
    const int height = min(m_blocks() - band * 8, 8);
    return {(band * 8 + inside % height) * ROWS, inside / height * kColumns};
  }

  // Call work(place) for each part of the result that this block's cluster computes.
  template <typename Work>
  __device__ __forceinline__ void for_places(const Work& work) const {
    const int split = cluster_size();
    for (int index = blockIdx.x / split; index < m_blocks() * n_blocks();
         index += gridDim.x / split) {
      work(place_of(index));
    }
  }

  // Call copy(place, tile, stage, barrier) for every stage once it is empty.
  template <typename Copy>
  __device__ __forceinline__ void fill(const Copy& copy) const {
    Cursor<R::kStages> at;
    for_places([&](const Place& place) {
#pragma unroll 1
      for (int tile = k_begin; tile < k_end; ++tile) {
        barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
        copy(place, tile, at.stage, full + 8 * at.stage);
        at.advance();
      }
    });
  }

  // One lane of each of two warps.
  __device__ __forceinline__ void produce(int warp) const {
    if (warp == 0) {
      fill([&](const Place& place, int tile, int stage, uint32_t barrier) {
        const int begin = place.n / kSide, end = min(begin + kColumns / kSide, n_pad() / kSide);
        barrier_expect(barrier, (end - begin) * R::kTile);
        uint32_t to = address + stage * R::kStage + R::kX;
        const uint32_t* from = p.weight.tiles + (int64_t{begin} * k_tiles() + tile) * (128 * BITS);
#pragma unroll 1
        for (int i = begin; i < end; ++i) {
          bulk_copy(to, from, R::kTile, barrier);
          to += R::kTile;
          from += int64_t{k_tiles()} * (128 * BITS);
        }
      });
      return;
    }
    const int scale_bytes = p.weight.scale_type == kFloat32 ? 4 : 2;
    const int all_rows = (m() + 7) / 8 * 8;
    wait_for_previous_kernel();  // which arranges x
    fill([&](const Place& place, int tile, int stage, uint32_t barrier) {
      const int rows = min(all_rows - place.m, ROWS), columns = min(n_pad() - place.n, kColumns);
      barrier_expect(barrier, rows * 128 +
                                  SPANS * columns * (scale_bytes + (p.weight.zeros ? 1 : 0)));
      bulk_copy(address + stage * R::kStage,
                static_cast<const uint8_t*>(p.workspace) + (int64_t{tile} * all_rows + place.m) * 128,
                rows * 128, barrier);
      uint32_t to = address + R::kStages * R::kStage + stage * R::kGrids;
#pragma unroll 1
      for (int s = 0; s < SPANS; ++s, to += kColumns * 4) {
        const int input = tile * kSide + (SPANS == 1 ? 0 : auto_gptq::place_of(s, 0, p.weight.run));
        const int group = min(input / static_cast<int>(p.weight.group_size),
                              static_cast<int>(p.weight.groups) - 1);
        const int64_t from = int64_t{group} * n_pad() + place.n;
        bulk_copy(to, static_cast<const uint8_t*>(p.weight.scales) + from * scale_bytes,
                  columns * scale_bytes, barrier);
        if (p.weight.zeros) {
          bulk_copy(to + R::kZeros - s * kColumns * 3, p.weight.zeros + from, columns, barrier);
        }
      }
    });
  }

  __device__ __forceinline__ void consume() const {
    constexpr DataType own = Pairs<T>::kMantissa == 10 ? kFloat16 : kBFloat16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = warp * 16 + lane / 4;  // warps lie along the outputs
    const bool own_scales = p.weight.scale_type == own, has_zeros = p.weight.zeros;
    const uint8_t* tiles = ring + R::kX + warp / 4 * R::kTile;
    const uint8_t* grids = ring + R::kStages * R::kStage;
    float sums[ROWS / 2];
    uint32_t a[4][4];
    Cursor<R::kStages> at;
    for_places([&](const Place& place) {
      int before = 0;
      for (int tile = k_begin; tile < k_end; ++tile) {
        barrier_wait(full + 8 * at.stage, at.parity);
        const LaneCodes<BITS> codes =
            read_codes<BITS>(tiles + at.stage * R::kStage, warp % 4, lane);
        const uint8_t* grid = grids + at.stage * R::kGrids;
        uint32_t scale[SPANS][2];
        read_scales(grid, column, own_scales, scale);
        mma_wait<0>();
        if (tile > k_begin && lane == 0) {
          barrier_arrive(empty + 8 * before);
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          decode<BITS, T>(codes, s, a[s]);
        }
        if (has_zeros) {
          shift_zeros(grid + R::kZeros + column, a);
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            a[s][f] = Pairs<T>::fma(a[s][f], scale[s * SPANS / 4][f % 2], 0);
          }
        }
        mma_fence();
        const uint64_t rows = rows_descriptor(address + at.stage * R::kStage);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          hopper::mma<ROWS, own == kBFloat16>(sums, a[s], rows + 2 * s, s > 0 || tile > k_begin);
        }
        mma_commit();
        before = at.stage;
        at.advance();
      }
      mma_wait<0>();
      if (lane == 0) {
        barrier_arrive(empty + 8 * before);
      }
      if (cluster_size() > 1) {
        share(sums, place);
      } else {
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
          const float* four = sums + 4 * i;
          store(place, i, make_float4(four[0], four[1], four[2], four[3]));
        }
      }
    });
  }

  __device__ __forceinline__ void read_scales(const uint8_t* grid,
                                              int column,
                                              bool own_scales,
                                              uint32_t (&scale)[SPANS][2]) const {
    if (own_scales) {
#pragma unroll
      for (int i = 0; i < SPANS * 2; ++i) {
        const uint8_t* scales = grid + i / 2 * kColumns * 4 + i % 2 * 16 + column * 2;
        scale[i / 2][i % 2] = twice(*reinterpret_cast<const uint16_t*>(scales));
      }
    } else {
#pragma unroll
      for (int i = 0; i < SPANS * 2; ++i) {
        const uint8_t* scales = grid + i / 2 * kColumns * 4;
        scale[i / 2][i % 2] = Pairs<T>::constant(
            load_scale(scales, column + i % 2 * 8, p.weight.scale_type));
      }
    }
  }

  // Zero points other than the middle code, which decode() takes off.
  __device__ __forceinline__ void shift_zeros(const uint8_t* zeros, uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int zero = zeros[s * SPANS / 4 * kColumns + f % 2 * 8];
        const float shift = static_cast<float>((1 << (BITS - 1)) - zero);
        a[s][f] = Pairs<T>::add(a[s][f], Pairs<T>::constant(shift));
      }
    }
  }

  // Every block of the cluster adds up some rows, always in the same order.
  __device__ __forceinline__ void share(const float (&sums)[ROWS / 2], const Place& place) const {
    constexpr uint32_t kBytes = kConsumers * 16;
    const int split = cluster_size(), rank = cluster_rank();
    constexpr int kEights = ROWS / 8;
    const int most = (kEights + split - 1) / split;  // rows of a block, in eights
    const auto first = [&](int owner) { return (owner * kEights + split - 1) / split; };
    cluster_sync();  // nobody needs the ring any more
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const int owner = i * split / kEights;
      const uint32_t slot = rank * most + i - first(owner);
      store_remote(map_shared(address + slot * kBytes + threadIdx.x * 16, owner), sums + 4 * i);
    }
    cluster_sync();
#pragma unroll 1
    for (int i = 0; i < first(rank + 1) - first(rank); ++i) {
      float4 sum = make_float4(0, 0, 0, 0);
      for (int source = 0; source < split; ++source) {
        const float4 part = *reinterpret_cast<const float4*>(
            ring + (source * most + i) * kBytes + threadIdx.x * 16);
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      store(place, first(rank) + i, sum);
    }
  }

  // Four sums of a lane: two outputs, eight apart, of two neighbours among eight rows.
  __device__ __forceinline__ void store(const Place& place, int eight, float4 sum) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = place.m + eight * 8 + lane / 4;
    const int output = place.n + warp * 16;
    if (output >= n()) {  // a multiple of 32
      return;
    }
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias) + output + lane / 4;
      const float low = static_cast<float>(bias[0]), high = static_cast<float>(bias[8]);
      sum.x += low;
      sum.y += low;
      sum.z += high;
      sum.w += high;
    }
    const uint32_t low = transpose(pack<T>(sum.x, sum.y));
    const uint32_t high = transpose(pack<T>(sum.z, sum.w));
    if (row < m()) {
      T* to = static_cast<T*>(p.y) + static_cast<int64_t>(row) * n() + output + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = low;
      *reinterpret_cast<uint32_t*>(to + 8) = high;
    }
  }
};

template <int BITS, typename T, int ROWS, int SPANS>
__global__ void __launch_bounds__(kThreads, 1) q_wgmma(const __grid_constant__ Product p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using R = Ring<BITS, ROWS, SPANS>;
  extern __shared__ uint8_t shared[];
  __shared__ alignas(8) uint64_t barriers[2 * R::kStages];
  Block<BITS, T, ROWS, SPANS> block{p};
  block.address = (shared_address(shared) + 1023) / 1024 * 1024;
  block.ring = shared + (block.address - shared_address(shared));
  block.full = shared_address(barriers);
  block.empty = block.full + 8 * R::kStages;
  const int split = cluster_size(), rank = cluster_rank();
  block.k_begin = block.k_tiles() * rank / split;
  block.k_end = block.k_tiles() * (rank + 1) / split;
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kStages; ++s) {
      barrier_init(block.full + 8 * s, 2);  // one lane of each of two producers
      barrier_init(block.empty + 8 * s, kConsumers / 32);
    }
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_registers<32>();
    const int warp = (threadIdx.x - kConsumers) / 32;
    if (warp < 2 && threadIdx.x % 32 == 0) {
      block.produce(warp);
    }
    __syncwarp();
    if (split > 1) {
      cluster_sync();
      cluster_sync();
    }
  } else {
    take_registers<112>();
    block.consume();
  }
#endif
}

template <int BITS, typename T, int ROWS, int SPANS>
cudaError_t start(const Product& product, int split, int blocks, cudaStream_t stream) {
  using R = Ring<BITS, ROWS, SPANS>;
  const auto kernel = q_wgmma<BITS, T, ROWS, SPANS>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::kBytes);
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = split;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = R::kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, product);
}

// What a stage of 64 inputs costs a block, in nanoseconds, measured on an H100.
constexpr struct {
  int rows, stage;
} kCosts[] = {{32, 560}, {64, 650}, {128, 850}};
constexpr int kStart = 2500;     // until a block's first product, and to store the result
constexpr int kExchange = 1500;  // of a cluster's sums

// How many clusters of 1 to 8 blocks an H100 has room for at once, out of 132 multiprocessors.
constexpr int kClusters[] = {0, 132, 66, 39, 30, 22, 17, 15, 15};

struct Choice {
  int rows, split, blocks;
};

Choice choose(const Product& p, int multiprocessors) {
  const int64_t n_blocks = (p.weight.n + kColumns - 1) / kColumns;
  const int64_t k_tiles = (p.weight.k + kSide - 1) / kSide;
  Choice best = {};
  int64_t least = INT64_MAX;
  for (const auto& cost : kCosts) {
    const int64_t blocks = (p.m + cost.rows - 1) / cost.rows * n_blocks;
    for (int split = 1; split <= 8 && split <= std::min<int64_t>(cost.rows / 8, k_tiles); ++split) {
      const int64_t at_once = std::max(multiprocessors * kClusters[split] / 132, 1);
      if (split > 1 && blocks > at_once) {
        break;
      }
      const int64_t waves = (blocks + at_once - 1) / at_once;
      const int64_t time = waves * ((k_tiles + split - 1) / split * cost.stage + kStart) +
                           (split > 1 ? kExchange : 0);
      if (time < least) {
        least = time;
        best = {cost.rows, split,
                static_cast<int>(split > 1 ? blocks * split : std::min(blocks, at_once))};
      }
    }
  }
  return best;
}

template <int BITS, typename T, int SPANS>
cudaError_t start_rows(const Product& product, const Choice& choice, cudaStream_t stream) {
  switch (choice.rows) {
    case 32:
      return start<BITS, T, 32, SPANS>(product, choice.split, choice.blocks, stream);
    case 64:
      return start<BITS, T, 64, SPANS>(product, choice.split, choice.blocks, stream);
    default:
      return start<BITS, T, 128, SPANS>(product, choice.split, choice.blocks, stream);
  }
}

template <int BITS>
cudaError_t start_type(const Product& product, const Choice& choice, cudaStream_t stream) {
  const bool one_group = product.weight.run == kSide;
  if (product.type == kFloat16) {
    return one_group ? start_rows<BITS, __half, 1>(product, choice, stream)
                     : start_rows<BITS, __half, 4>(product, choice, stream);
  }
  return one_group ? start_rows<BITS, __nv_bfloat16, 1>(product, choice, stream)
                   : start_rows<BITS, __nv_bfloat16, 4>(product, choice, stream);
}

cudaError_t start_bits(const Product& product, const Choice& choice, cudaStream_t stream) {
  switch (product.weight.bits) {
    case 2:
      return start_type<2>(product, choice, stream);
    case 3:
      return start_type<3>(product, choice, stream);
    case 4:
      return start_type<4>(product, choice, stream);
    default:
      return start_type<8>(product, choice, stream);
  }
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_q_wgmma(const Product* product, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const char* failure = arrange(*product, on);
  if (failure) {
    return failure;
  }
  return outcome(start_bits(*product, choose(*product, current_device().processors), on));
}
