// Some dozen rows of an expert at a time, on the tensor cores.
//
// A warp computes 32 outputs for up to 64 rows, and as many products as there are rows: two row tiles, whose codes go from memory straight into
// its registers, a few tiles ahead, and become 16-bit weights there.  Rows of x come through shared
// memory in their own order, which is that of the lanes.  KW warps share out the inputs of the same
// outputs, so that there are blocks enough where outputs are few.
#pragma once

#include "experts.cuh"

namespace auto_gptq {

constexpr int kManyThreads = 256;

constexpr int kManyRows = 64;

template <int BITS, typename T, int KW, int SPANS>
struct Many {
  static constexpr int kWarps = kManyThreads / 32, NW = kWarps / KW;  // warps side by side
  static constexpr int kOutputs = 32 * NW;                            // of a block
  static constexpr int kStages = 4;                 // tiles of x in shared memory
  // Rows lie 16 bytes apart modulo 128, so that eight rows meet no bank twice.
  static constexpr int kPitch = 2 * kSide + 16, kStageBytes = kManyRows * kPitch;
  static constexpr int kSharedBytes = KW * kStages * kStageBytes;
  static constexpr int kCopies = kManyRows * 8 / (32 * NW);  // vectors that a thread copies of a tile

  // What a lane has of a tile: codes, and per span the grids of its outputs.
  struct Held {
    LaneCodes<BITS> codes[2];
    uint32_t scale[2][SPANS][2];
    uint32_t zero[2][SPANS][2];
  };

  const Grouped& p;
  const Part part;
  const int lane = threadIdx.x % 32, wk = threadIdx.x / 32 / NW, wn = threadIdx.x / 32 % NW;
  int output, first_tile, last_tile, steps;
  const uint32_t* tiles;
  int64_t grid;
  char* ring;
  const T* source[kCopies];  // null: there is no such row

  __device__ Many(const Grouped& task, Part which, int block_output, char* memory)
      : p(task), part(which) {
    output = block_output + 32 * wn;
    steps = (p.k_tiles + KW - 1) / KW;
    first_tile = min(wk * steps, p.k_tiles);
    last_tile = min(first_tile + steps, p.k_tiles);
    const int own = min(output, p.n_pad - 32);  // padding of the last block computes anything
    tiles = p.tiles + part.expert * p.tile_words +
            static_cast<int64_t>(own / kSide) * p.k_tiles * (128 * BITS);
    grid = part.expert * p.grids + own + lane / 4;
    ring = memory + wk * kStages * kStageBytes;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = vector_of(i) / 8;
      source[i] = nullptr;
      if (row < part.count) {
        const int s = part.first + row;
        source[i] = static_cast<const T*>(p.x) + static_cast<int64_t>(p.rows ? p.rows[s] : s) * p.k +
                    vector_of(i) % 8 * 8;
      }
    }
  }

  __device__ __forceinline__ int vector_of(int i) const { return wn * 32 + lane + i * 32 * NW; }

  __device__ __forceinline__ void copy_x(int tile) const {
    if (tile < last_tile) {
      const uint32_t to = shared_address(ring) + tile % kStages * kStageBytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int vector = vector_of(i), at = tile * kSide;
        if (source[i]) {
          copy_or_clear(to + vector / 8 * kPitch + vector % 8 * 16, source[i] + at,
                        at + vector % 8 * 8 < p.k);
        }
      }
    }
    end_group();
  }

  __device__ __forceinline__ void hold(Held& h, int tile) const {
    if (tile >= last_tile) {
      return;
    }
    const uint32_t* from = tiles + static_cast<int64_t>(tile) * (128 * BITS);
    const int row_tile = min(output, p.n_pad - 32) % kSide / 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      h.codes[r] = load_codes<BITS>(from, row_tile + r, lane);
#pragma unroll
      for (int s = 0; s < SPANS; ++s) {
        const int run = SPANS == 1 ? tile : (tile * kSide + place_of(s, 0, p.run)) / p.run;
        const int64_t at = grid + static_cast<int64_t>(group_of(p, run)) * p.n_pad + 16 * r;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          h.scale[r][s][i] = scale_bits(p, at + 8 * i);
          h.zero[r][s][i] = p.zeros ? p.zeros[at + 8 * i] : 0;
        }
      }
    }
  }

  // The B operands of steps s and s + 1 for eight rows of x.
  __device__ __forceinline__ void read_x(const char* stage, int eight, int s, uint32_t (&b)[4]) const {
    const char* row = stage + (8 * eight + lane / 4) * kPitch;
    const int q = lane % 4;
    if constexpr (SPANS == 1) {
      const uint4 v = *reinterpret_cast<const uint4*>(row + 32 * q + 8 * s);
      b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint2 v = *reinterpret_cast<const uint2*>(row + 2 * place_of(s + j, q, p.run));
        b[2 * j] = v.x, b[2 * j + 1] = v.y;
      }
    }
  }

  template <int EIGHTS>
  using Sums = float[2][EIGHTS][4];

  template <int EIGHTS>
  __device__ __forceinline__ void multiply(Sums<EIGHTS>& sums, const Held& h, const char* stage) const {
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      uint32_t a[2][2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int span = (s + j) * SPANS / 4;
          scaled_weights<BITS, T>(p, h.codes[r], s + j, h.scale[r][span], h.zero[r][span], a[r][j]);
        }
      }
#pragma unroll
      for (int eight = 0; eight < EIGHTS; ++eight) {
        uint32_t b[4];
        read_x(stage, eight, s, b);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            mma<T>(sums[r][eight], a[r][j], b[2 * j], b[2 * j + 1]);
          }
        }
      }
    }
  }

  template <int EIGHTS>
  __device__ __forceinline__ void run(Sums<EIGHTS>& sums) const {
    constexpr int kAhead = EIGHTS > 4 || SPANS > 1 ? 1 : 2;  // tiles of codes in registers
    Held held[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      hold(held[i], first_tile + i);
    }
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      copy_x(first_tile + i);
    }
#pragma unroll 1
    for (int step = 0; step < steps; step += kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int tile = first_tile + step + ahead;
        wait_for_groups<kStages - 2>();
        __syncthreads();  // of x: here for all, and what it takes the place of is used up
        copy_x(tile + kStages - 1);
        if (tile < last_tile) {
          multiply<EIGHTS>(sums, held[ahead], ring + tile % kStages * kStageBytes);
          hold(held[ahead], tile + kAhead);
        }
      }
    }
    wait_for_groups<0>();
  }

  // Add up the sums of warps that shared out the inputs: they end in those with wk = 0.
  template <int EIGHTS>
  __device__ __forceinline__ void add_up(Sums<EIGHTS>& sums, char* memory) const {
    constexpr int kFragments = 2 * EIGHTS;
    auto* all = reinterpret_cast<float4*>(memory);
    __syncthreads();
    float* flat = &sums[0][0][0];
    if (wk > 0) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        all[(((wk - 1) * NW + wn) * kFragments + f) * 32 + lane] =
            make_float4(flat[4 * f], flat[4 * f + 1], flat[4 * f + 2], flat[4 * f + 3]);
      }
    }
    __syncthreads();
    if (wk == 0) {
#pragma unroll 1
      for (int other = 0; other < KW - 1; ++other) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const float4 v = all[((other * NW + wn) * kFragments + f) * 32 + lane];
          flat[4 * f] += v.x, flat[4 * f + 1] += v.y, flat[4 * f + 2] += v.z, flat[4 * f + 3] += v.w;
        }
      }
    }
  }

  // A lane has, of a row tile and eight rows, outputs lane / 4 and 8 more for two rows.
  template <int EIGHTS>
  __device__ __forceinline__ void write(const Sums<EIGHTS>& sums) const {
    if (wk > 0 || output >= p.n) {  // n is a multiple of 32
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int n = output + 16 * r + lane / 4;
      float add[2] = {0, 0};
      if (p.bias) {
        const T* bias = static_cast<const T*>(p.bias) + static_cast<int64_t>(part.expert) * p.n + n;
        add[0] = static_cast<float>(bias[0]);
        add[1] = static_cast<float>(bias[8]);
      }
#pragma unroll
      for (int eight = 0; eight < EIGHTS; ++eight) {
        const float* v = sums[r][eight];
        const uint32_t low = transposed(pack_pair<T>(v[0] + add[0], v[1] + add[0]));
        const uint32_t high = transposed(pack_pair<T>(v[2] + add[1], v[3] + add[1]));
        const int row = 8 * eight + lane / 4;
        if (row < part.count) {
          T* to = static_cast<T*>(p.y) + static_cast<int64_t>(part.first + row) * p.n + output +
                  16 * r + lane % 4 * 2;
          *reinterpret_cast<uint32_t*>(to) = low;
          *reinterpret_cast<uint32_t*>(to + 8) = high;
        }
      }
    }
  }

  template <int EIGHTS>
  __device__ __forceinline__ void all(char* memory) const {
    Sums<EIGHTS> sums = {};
    run<EIGHTS>(sums);
    if constexpr (KW > 1) {
      add_up<EIGHTS>(sums, memory);
    }
    write<EIGHTS>(sums);
  }
};

template <int BITS, typename T, int KW, int SPANS>
__global__ void __launch_bounds__(kManyThreads, 2) experts_many(const __grid_constant__ Grouped p) {
  using Kernel = Many<BITS, T, KW, SPANS>;
  extern __shared__ __align__(16) char memory[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Part part = find_part(p, kManyRows, blockIdx.x % p.parts);
  const int output = blockIdx.x / p.parts * Kernel::kOutputs;
  if (part.count == 0) {
    return;
  }
  if (part.expert == p.experts) {
    clear_rows<T>(p, part, output, Kernel::kOutputs);
    return;
  }
  const Kernel kernel(p, part, output, memory);
  switch ((part.count + 7) / 8) {
    case 1:
    case 2:
      return kernel.template all<2>(memory);
    case 3:
    case 4:
      return kernel.template all<4>(memory);
    case 5:
    case 6:
      return kernel.template all<6>(memory);
    default:
      return kernel.template all<8>(memory);
  }
}

template <int BITS, typename T, int KW>
const char* start_many(const Experts& task, cudaStream_t stream) {
  const Grouped made = describe(task, kManyRows);
  constexpr int kOutputs = Many<BITS, T, KW, 1>::kOutputs;
  constexpr int kBytes = Many<BITS, T, KW, 1>::kSharedBytes;
  const dim3 blocks(static_cast<unsigned>((made.n_pad + kOutputs - 1) / kOutputs * made.parts));
  return launch(
      made.run == kSide ? experts_many<BITS, T, KW, 1> : experts_many<BITS, T, KW, 4>, made,
      blocks, kManyThreads, kBytes, stream);
}

}  // namespace auto_gptq
