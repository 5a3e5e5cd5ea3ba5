// Many rows of an expert at a time, on Hopper's warpgroup tensor cores.
//
// A block of four warpgroups computes 256 outputs for up to 128 rows, a warpgroup 64: codes go from
// memory into its registers, a tile ahead, and become 16-bit weights there.  Arranged x, [parts,
// K' / 64, 128 rows, 128 bytes], comes through shared memory, kStages tiles ahead.
#include "experts.cuh"
#include "hopper.cuh"
#include "q_experts.h"

namespace auto_gptq {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kRows = 128, kOutputs = 256;
constexpr int kStages = 6, kStageBytes = kRows * 2 * kSide;

struct Arrange {
  Grouped grouped;
  const int32_t* perm;  // [E, K] or null
  uint4* to;
};

// Eight inputs of a row as the tensor cores take them: of one step, of four lanes, their i = 0, 1 or
// i = 2, 3; as in arrange.cu.
__device__ __forceinline__ uint4 arranged_inputs(
    const uint16_t* x, const int32_t* perm, int k, int tile, int chunk, int run) {
  uint32_t pair[4] = {0, 0, 0, 0};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int at = tile * kSide + place_of(chunk / 2, q, run) + chunk % 2 * 2;
    if (at < k && perm) {
      const int2 from = *reinterpret_cast<const int2*>(perm + at);
      pair[q] = x[from.x] | static_cast<uint32_t>(x[from.y]) << 16;
    } else if (at < k) {
      pair[q] = *reinterpret_cast<const uint32_t*>(x + at);
    }
  }
  return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// A block brings the rows of a part for one tile of inputs; a thread eight inputs of a row.
__global__ void __launch_bounds__(256) arrange_parts(const __grid_constant__ Arrange task) {
  const Grouped& p = task.grouped;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Part part = find_part(p, kRows, blockIdx.x);
  if (part.count == 0 || part.expert == p.experts) {
    return;
  }
  const int tile = blockIdx.y;
  const int32_t* perm = task.perm ? task.perm + static_cast<int64_t>(part.expert) * p.k : nullptr;
  uint4* to = task.to + (static_cast<int64_t>(blockIdx.x) * p.k_tiles + tile) * (kRows * 8);
  for (int i = threadIdx.x; i < part.count * 8; i += 256) {
    const int row = i / 8, chunk = i % 8, s = part.first + row;
    const uint16_t* x = static_cast<const uint16_t*>(p.x) +
                        static_cast<int64_t>(p.rows ? p.rows[s] : s) * p.k;
    to[row * 8 + (chunk ^ (row % 8))] = arranged_inputs(x, perm, p.k, tile, chunk, p.run);
  }
}

template <int BITS, typename T>
struct Wide {
  const Grouped& p;
  const Part part;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int output;  // of this warp
  const uint32_t* tiles;
  int64_t grid;
  const char* x;
  uint32_t ring, full, empty;  // addresses of the stages and of their barriers
  int bytes;                   // of x in a stage

  LaneCodes<BITS> codes;
  uint32_t scale[2], zero[2];

  __device__ __forceinline__ void hold(int tile) {
    codes = load_codes<BITS>(tiles + static_cast<int64_t>(tile) * (128 * BITS), warp % 4, lane);
    const int64_t at = grid + static_cast<int64_t>(group_of(p, tile)) * p.n_pad;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = scale_bits(p, at + 8 * i);
      zero[i] = p.zeros ? p.zeros[at + 8 * i] : 0;
    }
  }

  __device__ __forceinline__ void copy_x(int tile) const {
    const uint32_t slot = tile % kStages;
    hopper::barrier_expect(full + 8 * slot, bytes);
    hopper::bulk_copy(ring + slot * kStageBytes, x + static_cast<int64_t>(tile) * kStageBytes, bytes,
                      full + 8 * slot);
  }

  template <int ROWS>
  __device__ __forceinline__ void run() {
    float sums[ROWS / 2] = {};
    if (threadIdx.x == 0) {
      for (int tile = 0; tile < min(kStages, p.k_tiles); ++tile) {
        copy_x(tile);
      }
    }
    hold(0);
#pragma unroll 1
    for (int tile = 0; tile < p.k_tiles; ++tile) {
      const uint32_t slot = tile % kStages, parity = tile / kStages % 2;
      uint32_t a[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        scaled_weights<BITS, T>(p, codes, s, scale, zero, a[s]);
      }
      if (tile + 1 < p.k_tiles) {
        hold(tile + 1);
      }
      hopper::barrier_wait(full + 8 * slot, parity);
      const uint64_t rows = hopper::rows_descriptor(ring + slot * kStageBytes);
      hopper::mma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        hopper::mma<ROWS, Pairs<T>::kMantissa == 7>(sums, a[s], rows + 2 * s, 1);
      }
      hopper::mma_commit();
      hopper::mma_wait<0>();
      if (lane == 0) {
        hopper::barrier_arrive(empty + 8 * slot);
      }
      // The stage before has been left by all, or nearly: what is copied into it is far ahead.
      if (threadIdx.x == 0 && tile > 0 && tile - 1 + kStages < p.k_tiles) {
        const uint32_t before = (tile - 1) % kStages;
        hopper::barrier_wait(empty + 8 * before, (tile - 1) / kStages % 2);
        copy_x(tile - 1 + kStages);
      }
    }
    write<ROWS>(sums);
  }

  template <int ROWS>
  __device__ __forceinline__ void write(const float (&sums)[ROWS / 2]) const {
    if (output >= p.n) {
      return;
    }
    const int n = output + lane / 4;
    float add[2] = {0, 0};
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias) + static_cast<int64_t>(part.expert) * p.n + n;
      add[0] = static_cast<float>(bias[0]);
      add[1] = static_cast<float>(bias[8]);
    }
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; ++eight) {
      const float* v = sums + 4 * eight;
      const uint32_t low = transposed(pack_pair<T>(v[0] + add[0], v[1] + add[0]));
      const uint32_t high = transposed(pack_pair<T>(v[2] + add[1], v[3] + add[1]));
      const int row = 8 * eight + lane / 4;
      if (row < part.count) {
        T* to = static_cast<T*>(p.y) + static_cast<int64_t>(part.first + row) * p.n + output +
                lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = low;
        *reinterpret_cast<uint32_t*>(to + 8) = high;
      }
    }
  }
};

template <int BITS, typename T>
__global__ void __launch_bounds__(kThreads, 1) experts_wide(const __grid_constant__ Grouped p) {
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages;
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(full + 8 * i, 1);
      hopper::barrier_init(empty + 8 * i, kWarps);
    }
    hopper::barriers_ready();
  }
  __syncthreads();
  wait_for_previous_kernel();
  const int index = blockIdx.x % p.parts, block_output = blockIdx.x / p.parts * kOutputs;
  const Part part = find_part(p, kRows, index);
  if (part.count == 0) {
    return;
  }
  if (part.expert == p.experts) {
    clear_rows<T>(p, part, block_output, kOutputs);
    return;
  }
  Wide<BITS, T> own{p, part};
  own.output = block_output + 16 * own.warp;
  const int group = min(block_output + own.warp / 4 * kSide, p.n_pad - kSide);
  own.tiles = p.tiles + part.expert * p.tile_words +
              static_cast<int64_t>(group / kSide) * p.k_tiles * (128 * BITS);
  own.grid = part.expert * p.grids + group + own.warp % 4 * 16 + own.lane / 4;
  own.x = static_cast<const char*>(p.x) + static_cast<int64_t>(index) * p.k_tiles * kStageBytes;
  own.ring = (shared_address(memory) + 1023) / 1024 * 1024;
  own.full = full;
  own.empty = empty;
  own.bytes = (part.count + 7) / 8 * 8 * 2 * kSide;
  if (part.count <= 64) {
    own.template run<64>();
  } else {
    own.template run<128>();
  }
}

template <int BITS>
const char* start(const Experts& task, const Grouped& made, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((made.n_pad + kOutputs - 1) / kOutputs * made.parts));
  return launch(task.type == kFloat16 ? experts_wide<BITS, __half>
                                      : experts_wide<BITS, __nv_bfloat16>,
                made, blocks, kThreads, kStages * kStageBytes + 1024, stream);
}

}  // namespace

int64_t wide_experts_bytes(const Experts& task) {
  return most_parts(task, kRows) * ((task.weight.k + kSide - 1) / kSide) * kStageBytes;
}

const char* start_wide_experts(const Experts& task, cudaStream_t stream) {
  Grouped made = describe(task, kRows);
  const Arrange first{made, task.weight.perm, static_cast<uint4*>(task.workspace)};
  const dim3 blocks(static_cast<unsigned>(made.parts), static_cast<unsigned>(made.k_tiles));
  const char* failure = launch(arrange_parts, first, blocks, 256, 0, stream);
  if (failure) {
    return failure;
  }
  made.x = task.workspace;
  switch (task.weight.bits) {
    case 2:
      return start<2>(task, made, stream);
    case 3:
      return start<3>(task, made, stream);
    case 4:
      return start<4>(task, made, stream);
    default:
      return start<8>(task, made, stream);
  }
}

}  // namespace auto_gptq
