// y = x W^T for some dozen to some hundred rows of x, on the tensor cores of Hopper.
//
// A block computes its outputs for ROWS rows of x: the transposed product, so that the weight is the
// operand that comes from registers, where its codes become numbers.  Four warps of producers keep a
// ring of stages full, a stage being some tiles of arranged x (arrange.h), codes and grids.
// A warpgroup of consumers has 64 outputs or twice as many; while the products of one tile run, it
// decodes the next, into other registers.
//
// Results are rows by outputs of a block.  Where they do not fill all multiprocessors, the stages of
// all results are dealt out evenly, so blocks have parts of results, and a second kernel adds them
// up, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "arrange.h"
#include "hopper.cuh"
#include "mma.cuh"
#include "store.cuh"
#include "tiles.cuh"

namespace auto_gptq {

using namespace hopper;

// How a block is built.
template <int ROWS, int GROUPS, int TILES, int DEPTH>
struct Layout {
  static constexpr int kRows = ROWS;            // of x
  static constexpr int kGroups = GROUPS;        // warpgroups of consumers
  static constexpr int kTiles = TILES;          // tiles of outputs that a warpgroup has
  static constexpr int kDepth = DEPTH;          // tiles of inputs in a stage
  static constexpr int kUnits = TILES * DEPTH;  // tiles that a warpgroup has in a stage
  static constexpr int kColumns = GROUPS * TILES * kSide;
  static constexpr int kConsumers = GROUPS * 128, kThreads = kConsumers + 128;
  static constexpr int kEights = TILES * ROWS / 8;  // quadruples of sums that a thread has
  // A multiprocessor has 64 Ki registers, a thread gets multiples of 8 at the start.
  static constexpr int kGive = GROUPS == 2 ? 40 : 56;
  static constexpr int kTake = GROUPS == 4 ? 104 : GROUPS == 3 ? 152 : 232;
  static_assert(kUnits % 2 == 0);  // they take turns with two sets of registers
};

// Which grids a kernel understands.
enum class Grids {
  kOwn,    // scales of the type of x, no zeros, one group for the 64 inputs of a tile
  kAny,    // one group for the 64 inputs of a tile
  kSteps,  // each step of a tile may have a group of its own
};

// What one kernel multiplies and where it keeps it in shared memory.
template <int BITS_, typename T_, Grids GRIDS_, typename L>
struct Config : L {
  using T = T_;
  static constexpr int kBits = BITS_;
  static constexpr Grids kGrids = GRIDS_;
  static constexpr int kSpans = GRIDS_ == Grids::kSteps ? 4 : 1;
  static constexpr bool kOwn = GRIDS_ == Grids::kOwn;
  static constexpr DataType kType = Pairs<T>::kMantissa == 10 ? kFloat16 : kBFloat16;

  static constexpr int kX = L::kRows * 128;  // bytes of 64 inputs
  static constexpr int kTile = 512 * kBits;
  static constexpr int kColumn = L::kDepth * kTile;  // tiles of one 64 outputs lie together
  static constexpr int kStage = L::kDepth * kX + L::kColumns / kSide * kColumn;
  static constexpr int kSpan = L::kColumns * (kOwn ? 2 : 4);  // bytes of scales
  static constexpr int kZeros = kSpans * kSpan;
  static constexpr int kGrid = kZeros + (kOwn ? 0 : kSpans * L::kColumns);  // of 64 inputs
  static constexpr int kPerStage = kStage + L::kDepth * kGrid;
  static constexpr int kStages = std::min((226 << 10) / kPerStage, 12);
  static constexpr int kGridsAt = kStages * kStage;
  static constexpr int kBarriersAt = kStages * kPerStage;
  static constexpr int kBytes = kBarriersAt + 16 * kStages;
  static_assert(kStage % 1024 == 0 && kStages > 1 && kBytes <= 227 << 10);
};

struct Deal : Product {
  int32_t m_blocks, n_blocks;  // results
  int32_t k_tiles;             // of the inputs
  int32_t stages;              // of a result
  int32_t blocks;              // that run
  int32_t share, longer;       // stages of a block; the first `longer` have one more
  int32_t all_rows, n_pad;     // of arranged x, of scales
  int32_t whole;               // blocks take whole results in turn
  float4* parts;               // [blocks + results - 1, eights, threads]

  __device__ __forceinline__ int results() const { return m_blocks * n_blocks; }

  // The first of the stages of all results that are dealt to a block, and the block of a stage.
  __device__ __forceinline__ int begin_of(int block) const {
    return block * share + min(block, longer);
  }
  __device__ __forceinline__ int block_of(int stage) const {
    const int behind = stage - longer * (share + 1);
    return behind < 0 ? stage / (share + 1) : longer + behind / share;
  }

  // A block's part of a result: of blocks and results in their order, each step adds one.
  __device__ __forceinline__ float4* part_of(int block, int result, int size) const {
    return parts + int64_t{block + result} * size + threadIdx.x;
  }
};

// The first row of x and the first output of a result.  Results next to each other share rows of x
// and tiles: eight of them have the same outputs.
template <typename C>
__device__ __forceinline__ int2 place_of_result(const Deal& p, int result) {
  const int band = result / (8 * p.n_blocks), inside = result % (8 * p.n_blocks);
  const int height = min(p.m_blocks - band * 8, 8);
  return make_int2((band * 8 + inside % height) * C::kRows, inside / height * C::kColumns);
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

// Loads from shared memory by address, which keep their order among waits for barriers.
__device__ __forceinline__ uint32_t load_half(uint32_t from) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ uint32_t load_byte(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

// A lane's codes of a tile that begins at `tile`, of one of its row tiles.
template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> read_codes(uint32_t tile, int row_tile, int lane) {
  LaneCodes<BITS> codes;
  if constexpr (BITS == 2 || BITS == 3) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(codes.word[0]), "=r"(codes.word[1])
                 : "r"(tile + row_tile * 256 + lane * 8));
    if constexpr (BITS == 3) {
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(codes.word[2])
                   : "r"(tile + 1024 + row_tile * 128 + lane * 4));
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(codes.word[4 * i]), "=r"(codes.word[4 * i + 1]),
                     "=r"(codes.word[4 * i + 2]), "=r"(codes.word[4 * i + 3])
                   : "r"(tile + (row_tile * (BITS / 4) + i) * 512 + lane * 16));
    }
  }
  return codes;
}

// Store quadruple i of a thread's sums.
template <typename C>
__device__ __forceinline__ void store_eight(const Product& p, int2 place, int i, float4 sum) {
  const int warp = threadIdx.x / 32, tile = warp / 4 * C::kTiles + i / (C::kRows / 8);
  store_sums<typename C::T>(p, place.x + i % (C::kRows / 8) * 8,
                            place.y + tile * kSide + warp % 4 * 16, sum);
}

template <typename C>
struct Worker {
  using T = typename C::T;
  const Deal& p;
  uint32_t ring, full, empty;  // addresses of the ring and of its barriers in shared memory

  // Call work(result, first stage, end) for each part that this block computes.
  template <typename Work>
  __device__ __forceinline__ void for_parts(const Work& work) const {
    const int block = blockIdx.x;
    const int end = p.whole ? p.results() * p.stages : p.begin_of(block + 1);
    int stage = p.whole ? block * p.stages : p.begin_of(block);
    while (stage < end) {
      const int first = stage % p.stages, last = min(p.stages, first + end - stage);
      work(stage / p.stages, first, last);
      stage += p.whole ? p.blocks * p.stages : last - first;
    }
  }

  // Call copy(place, tile of the inputs, slot, barrier) for the stages whose turn it is, once their
  // slots are empty.
  template <typename Copy>
  __device__ __forceinline__ void fill(int turn, int turns, const Copy& copy) const {
    Cursor<C::kStages> at;
    for_parts([&](int result, int first, int last) {
      const int2 place = place_of_result<C>(p, result);
#pragma unroll 1
      for (int stage = first; stage < last; ++stage) {
        if (turn == 0) {
          barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
          copy(place, stage * C::kDepth, at.stage, full + 8 * at.stage);
          turn = turns;
        }
        --turn;
        at.advance();
      }
    });
  }

  // One lane of each of four warps.  What belongs to weights takes so many instructions that one
  // warp, beside those that decode, does not keep up: three take turns.
  __device__ __forceinline__ void produce(int warp) const {
    if (warp == 0) {
      wait_for_previous_kernel();  // which arranges x
      fill(0, 1, [&](int2 place, int tile, int slot, uint32_t barrier) {
        copy_x(place, tile, ring + slot * C::kStage, barrier);
      });
    } else {
      fill(warp - 1, 3, [&](int2 place, int tile, int slot, uint32_t barrier) {
        copy_weight(place, tile, slot, barrier);
      });
    }
  }

  // Behind the last inputs there are zeros of x, and any codes that happen to be there.
  __device__ __forceinline__ void copy_x(int2 place,
                                         int tile,
                                         uint32_t to,
                                         uint32_t barrier) const {
    const int rows = min(p.all_rows - place.x, C::kRows);
    barrier_expect(barrier, C::kDepth * rows * 128);
    const auto* from =
        static_cast<const uint8_t*>(p.workspace) + (int64_t{tile} * p.all_rows + place.x) * 128;
#pragma unroll
    for (int d = 0; d < C::kDepth; ++d) {
      bulk_copy(to, from, rows * 128, barrier);
      to += C::kX;
      from += int64_t{p.all_rows} * 128;
    }
  }

  __device__ __forceinline__ void copy_weight(int2 place,
                                              int tile,
                                              int slot,
                                              uint32_t barrier) const {
    const int columns = min(p.n_pad - place.y, C::kColumns), first = place.y / kSide;
    const int bytes = min(C::kDepth, p.k_tiles - tile) * C::kTile;
    const int scale_bytes = C::kOwn ? 2 : scale_size();
    const bool zeros = !C::kOwn && p.weight.zeros;
    barrier_expect(barrier, columns / kSide * bytes +
                                C::kDepth * C::kSpans * columns * (scale_bytes + zeros));
    uint32_t to = ring + slot * C::kStage + C::kDepth * C::kX;
    const uint32_t* from = p.weight.tiles + (int64_t{first} * p.k_tiles + tile) * (128 * C::kBits);
#pragma unroll 1
    for (int i = 0; i < columns; i += kSide) {
      bulk_copy(to, from, bytes, barrier);
      to += C::kColumn;
      from += int64_t{p.k_tiles} * (128 * C::kBits);
    }
    to = ring + C::kGridsAt + slot * (C::kDepth * C::kGrid);
#pragma unroll 1
    for (int i = 0; i < C::kDepth * C::kSpans; ++i) {
      const int span = i % C::kSpans;
      const uint32_t input =
          (tile + i / C::kSpans) * kSide + (C::kSpans == 1 ? 0 : input_of(span));
      const uint32_t group = min(input / static_cast<uint32_t>(p.weight.group_size),
                                 static_cast<uint32_t>(p.weight.groups) - 1);
      const int64_t at = int64_t{group} * p.n_pad + place.y;
      bulk_copy(to + span * C::kSpan,
                static_cast<const uint8_t*>(p.weight.scales) + at * scale_bytes,
                columns * scale_bytes, barrier);
      if (zeros) {
        bulk_copy(to + C::kZeros + span * C::kColumns, p.weight.zeros + at, columns, barrier);
      }
      to += span == C::kSpans - 1 ? C::kGrid : 0;
    }
  }

  __device__ __forceinline__ int input_of(int step) const {
    return auto_gptq::place_of(step, 0, p.weight.run);
  }
  __device__ __forceinline__ int scale_size() const {
    return p.weight.scale_type == kFloat32 ? 4 : 2;
  }

  __device__ __forceinline__ void consume() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / 4, column = group * (C::kTiles * kSide) + warp % 4 * 16 + lane / 4;
    uint32_t full = this->full, empty = this->empty;
    uint32_t tiles = ring + C::kDepth * C::kX + group * (C::kTiles * C::kColumn);
    uint32_t scales = ring + C::kGridsAt + column * (C::kOwn ? 2 : scale_size());
    uint32_t zeros = ring + C::kGridsAt + C::kZeros + column;
    // Otherwise they are computed again in every stage, while all wait for them.
    asm volatile("" : "+r"(full), "+r"(empty), "+r"(tiles), "+r"(scales), "+r"(zeros));
    Grid grid{p.weight};
    float sums[C::kTiles][C::kRows / 2];
    uint32_t a[2][4][4];
    Cursor<C::kStages> at;
    for_parts([&](int result, int first, int last) {
      int before = 0;
#pragma unroll 1
      for (int stage = first; stage < last; ++stage) {
        barrier_wait(full + 8 * at.stage, at.parity);
        LaneCodes<C::kBits> codes[C::kUnits];
#pragma unroll
        for (int u = 0; u < C::kUnits; ++u) {
          const int at_tile = u % C::kTiles * C::kColumn + u / C::kTiles * C::kTile;
          codes[u] =
              read_codes<C::kBits>(tiles + at.stage * C::kStage + at_tile, warp % 4, lane);
        }
        const uint64_t rows = rows_descriptor(ring + at.stage * C::kStage);
#pragma unroll
        for (int u = 0; u < C::kUnits; ++u) {
          const int d = u / C::kTiles, t = u % C::kTiles;
          const int at_grid = (at.stage * C::kDepth + d) * C::kGrid;
          grid.read(scales + at_grid, zeros + at_grid, t * kSide);
          mma_wait<1>();  // the products before the last, which had these registers
          if (u == 1 && stage > first && lane == 0) {
            barrier_arrive(empty + 8 * before);
          }
          uint32_t(&numbers)[4][4] = a[u % 2];
          grid.numbers(codes[u], numbers);
          mma_fence();
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            hopper::mma<C::kRows, C::kType == kBFloat16>(sums[t], numbers[s],
                                                         rows + (d * C::kX >> 4) + 2 * s,
                                                         s > 0 || d > 0 || stage > first);
          }
          mma_commit();
        }
        before = at.stage;
        at.advance();
      }
      mma_wait<0>();
      if (lane == 0) {
        barrier_arrive(empty + 8 * before);
      }
      finish(sums, result, last - first == p.stages);
    });
  }

  // Store sums, or leave them as a part of a result.
  __device__ __forceinline__ void finish(const float (&sums)[C::kTiles][C::kRows / 2],
                                         int result,
                                         bool complete) const {
    const int2 place = place_of_result<C>(p, result);
    float4* part = p.part_of(blockIdx.x, result, C::kEights * C::kConsumers);
#pragma unroll
    for (int i = 0; i < C::kEights; ++i) {
      const float* four = sums[i / (C::kRows / 8)] + i % (C::kRows / 8) * 4;
      const float4 sum = make_float4(four[0], four[1], four[2], four[3]);
      if (complete) {
        store_eight<C>(p, place, i, sum);
      } else {
        __stcg(part + i * C::kConsumers, sum);
      }
    }
  }

  // A lane's scales and zeros in one tile, for its two outputs.
  struct Grid {
    bool is_half, is_wide, has_zeros;
    uint32_t scale[C::kSpans][2], zero[C::kSpans][2];

    __device__ __forceinline__ explicit Grid(const Tiled& weight)
        : is_half(weight.scale_type == kFloat16),
          is_wide(weight.scale_type == kFloat32),
          has_zeros(weight.zeros != nullptr) {}

    // Without branches: between products that run, ptxas cannot have them.
    __device__ __forceinline__ void read(uint32_t scales, uint32_t zeros, int columns) {
#pragma unroll
      for (int i = 0; i < C::kSpans * 2; ++i) {
        const int span = i / 2, row = i % 2, column = columns + row * 8;
        if constexpr (C::kOwn) {
          scale[span][row] = twice(load_half(scales + column * 2));
        } else {
          const uint32_t from = scales + span * C::kSpan + column * (is_wide ? 4 : 2);
          const uint32_t low = load_half(from), high = load_half(from + 2);
          const float narrow = is_half ? __half2float(__ushort_as_half(low))
                                       : __uint_as_float(low << 16);
          const float value = is_wide ? __uint_as_float(high << 16 | low) : narrow;
          scale[span][row] = pack<T>(value, value);
          const uint32_t byte = load_byte(zeros + span * C::kColumns + column);
          const float number = has_zeros ? byte : 1 << (C::kBits - 1);
          zero[span][row] = pack<T>(number, number);
        }
      }
    }

    __device__ __forceinline__ void numbers(const LaneCodes<C::kBits>& codes,
                                            uint32_t (&a)[4][4]) const {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int span = s * C::kSpans / 4;
        decode<C::kBits, T, !C::kOwn>(codes, s, a[s], zero[span]);
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          a[s][f] = Pairs<T>::fma(a[s][f], scale[span][f % 2], 0);
        }
      }
    }
  };
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) q_wgmma(const __grid_constant__ Deal p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t ring = shared_address(shared), full = ring + C::kBarriersAt;
  const Worker<C> worker{p, ring, full, full + 8 * C::kStages};
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(worker.full + 8 * s, 2);  // of x, of weights
      barrier_init(worker.empty + 8 * s, C::kConsumers / 32);
    }
    barriers_ready();
  }
  __syncthreads();
  let_next_kernel_start();
  if (threadIdx.x >= C::kConsumers) {
    give_registers<C::kGive>();
    if (threadIdx.x % 32 == 0) {
      worker.produce((threadIdx.x - C::kConsumers) / 32);
    }
  } else {
    take_registers<C::kTake>();
    worker.consume();
  }
#endif
}

// y = the sums of the parts of results that several blocks share; block (i, result).
template <typename C>
__global__ void __launch_bounds__(C::kConsumers) add_parts(const __grid_constant__ Deal p) {
  let_next_kernel_start();
  const int i = blockIdx.x % C::kEights, result = blockIdx.x / C::kEights;
  const int first = p.block_of(result * p.stages);
  const int last = p.block_of((result + 1) * p.stages - 1);
  wait_for_previous_kernel();
  if (first == last) {
    return;
  }
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int block = first; block <= last; ++block) {
    const float4 part =
        __ldcg(p.part_of(block, result, C::kEights * C::kConsumers) + i * C::kConsumers);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  store_eight<C>(p, place_of_result<C>(p, result), i, sum);
}

}  // namespace auto_gptq
