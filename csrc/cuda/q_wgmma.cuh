// y = x W^T for some dozen to some hundred rows of x, on the tensor cores of Hopper.
//
// A block computes its outputs for ROWS rows of x: the transposed product, so that the weight is
// the operand that comes from registers, where its codes become numbers.  Warps of producers keep a
// ring of stages full, a stage being some tiles of x, codes and grids: two of them copy, others
// bring x into the order of the codes.  A warpgroup of consumers has 64 outputs or twice as many;
// while the products of one tile run, it decodes the next, into other registers.
//
// Results are rows by outputs of a block.  Where they do not fill all multiprocessors, either the
// blocks of a cluster share the stages of a result and add up in shared memory, or the stages of
// all results are dealt out evenly, and a second kernel adds up the parts: always in one order.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "hopper.cuh"
#include "mma.cuh"
#include "q_wgmma.h"
#include "q_wgmma_config.cuh"
#include "shared.cuh"
#include "store.cuh"
#include "tiles.cuh"
#include "warpgroup.cuh"

namespace auto_gptq {

using namespace hopper;

// The first row of x and the first output of a result.  Results next to each other share rows of x
// and tiles: eight of them have the same outputs.
template <typename C>
__device__ __forceinline__ int2 place_of_result(const Deal& p, int result) {
  const int band = result / (8 * p.n_blocks), inside = result % (8 * p.n_blocks);
  const int height = min(p.m_blocks - band * 8, 8);
  return make_int2((band * 8 + inside % height) * C::kRows, inside / height * C::kColumns);
}

__device__ __forceinline__ void add(float4& sum, float4 part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

// Store quadruples i and i + 1 of a thread's sums, i even.
template <typename C>
__device__ __forceinline__ void store_pair(
    const Product& p, int2 place, int i, float4 first, float4 second) {
  const int warp = threadIdx.x / 32, tile = warp / 4 * C::kTiles + i / (C::kRows / 8);
  store_sixteen_rows<typename C::T>(p, place.x + i % (C::kRows / 8) * 8,
                                    place.y + tile * kSide + warp % 4 * 16, first, second);
}

template <typename C>
struct Worker {
  using T = typename C::T;
  const Deal& p;
  uint32_t ring;                       // addresses in shared memory: of the ring,
  uint32_t come, full, empty, joined;  // of its barriers, and of the one for sums of a cluster

  // Call work(result, first stage, end) for each part that this block computes.
  template <typename Work>
  __device__ __forceinline__ void for_parts(const Work& work) const {
    const int block = blockIdx.x, split = p.split, rank = split ? block % split : 0;
    const int end = split ? p.results() * p.stages : p.begin_of(block + 1);
    const int stop = split ? p.stages * (rank + 1) / split : p.stages;
    int stage = split ? block / split * p.stages + p.stages * rank / split : p.begin_of(block);
    while (stage < end) {
      const int first = stage % p.stages, last = min(stop, first + end - stage);
      work(stage / p.stages, first, last);
      stage += split ? p.blocks / split * p.stages : last - first;
    }
  }

  // Call act(place, first tile of the inputs, slot) for every stage, once the slot's barrier, of
  // those that begin at `barriers`, has changed its phase.
  template <typename Act>
  __device__ __forceinline__ void for_stages(uint32_t barriers,
                                             uint32_t parity,
                                             const Act& act) const {
    Cursor<C::kStages> at;
    for_parts([&](int result, int first, int last) {
      const int2 place = place_of_result<C>(p, result);
#pragma unroll 1
      for (int stage = first; stage < last; ++stage) {
        barrier_wait(barriers + 8 * at.stage, at.parity ^ parity);
        act(place, stage * C::kDepth, at.stage);
        at.advance();
      }
    });
  }

  __device__ __forceinline__ void produce(int warp) const {
    if (warp == 0) {
      for_stages(empty, 1, [&](int2 place, int tile, int slot) { copy_weight(place, tile, slot); });
    } else if (warp > 1) {
      if (warp < 2 + C::kOrderers) {
        order_x(warp - 2);
      }
    } else if (threadIdx.x % 32 == 0) {
      const auto self = static_cast<uint16_t>(1 << cluster_rank());
      wait_for_previous_kernel();
      for_stages(empty, 1, [&](int2 place, int tile, int slot) {
        const uint32_t barrier = (C::kOrdersX ? come : full) + 8 * slot;
        barrier_expect(barrier, C::kDepth * min(static_cast<int>(p.m), C::kRows) * 128);
#pragma unroll
        for (int d = 0; d < C::kDepth; ++d) {
          box_copy(ring + slot * C::kStage + d * C::kX, &p.rows, (tile + d) * kSide, place.x,
                   barrier, self);
        }
      });
    }
  }

  // Some warps bring x into the order in which lanes have codes (arrange.h), where it lies: eight
  // lanes have a row's vectors of eight inputs, and each pair goes to a vector of another step.
  __device__ __forceinline__ void order_x(int warp) const {
    constexpr int kAtOnce = 4, kRows = 4 * kAtOnce;
    const int lane = threadIdx.x % 32, row = lane / 8, vector = lane % 8;
    const int run = p.weight.run, quarter = run / 4;
    const uint32_t from = row * 128 + (vector ^ row) * 16;
    uint32_t to[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int input = vector * 8 + i * 2, in_run = input % run, in_quarter = in_run % quarter;
      const int step = input / run * (run / 16) + in_quarter / 4;
      to[i] = row * 128 + ((2 * step + in_quarter % 4 / 2) ^ row) * 16 + in_run / quarter * 4;
    }
    for_stages(come, 0, [&](int2 place, int, int slot) {
      const int rows = min(static_cast<int>(p.m) - place.x, C::kRows);
#pragma unroll
      for (int d = 0; d < C::kDepth; ++d) {
        const uint32_t tile = ring + slot * C::kStage + d * C::kX;
#pragma unroll 1
        for (int first = warp * kRows; first < rows; first += C::kOrderers * kRows) {
          uint4 v[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {  // four rows, the swizzle of the next four differs
            v[i] = load_vector(tile + first * 128 + i * 512 + (from ^ i % 2 * 64));
          }
          __syncwarp();
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const uint32_t at = tile + first * 128 + i * 512;
            store_word(at + (to[0] ^ i % 2 * 64), v[i].x);
            store_word(at + (to[1] ^ i % 2 * 64), v[i].y);
            store_word(at + (to[2] ^ i % 2 * 64), v[i].z);
            store_word(at + (to[3] ^ i % 2 * 64), v[i].w);
          }
        }
      }
      publish_shared();
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(full + 8 * slot);
      }
    });
  }

  // Behind the last inputs there are zeros of x, and any codes that happen to be there.
  __device__ __forceinline__ void copy_weight(int2 place, int tile, int slot) const {
    const uint32_t lane = threadIdx.x % 32, barrier = full + 8 * slot;
    const int columns = min(p.n_pad - place.y, C::kColumns), first = place.y / kSide;
    const int bytes = min(C::kDepth, p.k_tiles - tile) * C::kTile;
    const int scale_bytes = scale_size();
    const bool zeros = C::kGrids == Grids::kAny ? p.weight.zeros != nullptr
                                                : C::kGrids == Grids::kZeros;
    if (lane == 0) {
      barrier_expect(barrier, columns / kSide * bytes +
                                  C::kDepth * C::kSpans * columns * (scale_bytes + zeros));
    }
    __syncwarp();
    if (lane < columns / kSide) {
      bulk_copy(ring + slot * C::kStage + C::kDepth * C::kX + lane * C::kColumn,
                p.weight.tiles + (int64_t{first + lane} * p.k_tiles + tile) * (128 * C::kBits),
                bytes, barrier);
    } else if (lane - 16 < C::kDepth * C::kSpans) {
      const int d = (lane - 16) / C::kSpans, span = (lane - 16) % C::kSpans;
      const uint32_t input = (tile + d) * kSide + span * (kSide / C::kSpans);
      const uint32_t group = min(input / static_cast<uint32_t>(p.weight.group_size),
                                 static_cast<uint32_t>(p.weight.groups) - 1);
      const int64_t at = int64_t{group} * p.n_pad + place.y;
      const uint32_t to = ring + C::kGridsAt + (slot * C::kDepth + d) * C::kGrid;
      bulk_copy(to + span * C::kSpan,
                static_cast<const uint8_t*>(p.weight.scales) + at * scale_bytes,
                columns * scale_bytes, barrier);
      if (zeros) {
        bulk_copy(to + C::kZeros + span * C::kColumns, p.weight.zeros + at, columns, barrier);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ int scale_size() const {
    return C::kGrids == Grids::kAny && p.weight.scale_type == kFloat32 ? 4 : 2;
  }

  __device__ __forceinline__ void consume() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / 4, column = group * (C::kTiles * kSide) + warp % 4 * 16 + lane / 4;
    uint32_t full = this->full, empty = this->empty;
    uint32_t tiles = ring + C::kDepth * C::kX + group * (C::kTiles * C::kColumn);
    uint32_t scales = ring + C::kGridsAt + column * scale_size();
    uint32_t zeros = ring + C::kGridsAt + C::kZeros + column;
    // Otherwise they are computed again in every stage, while all wait for them.
    asm volatile("" : "+r"(full), "+r"(empty), "+r"(tiles), "+r"(scales), "+r"(zeros));
    Grid<C> grid{p.weight};
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
          if constexpr (!C::kOrdersX) {
            order_codes(codes[u].word);
          }
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

  using Sums = float[C::kTiles][C::kRows / 2];

  __device__ __forceinline__ static const float* four_of(const Sums& sums, int i) {
    return sums[i / (C::kRows / 8)] + i % (C::kRows / 8) * 4;
  }

  __device__ __forceinline__ static float4 quadruple(const Sums& sums, int i) {
    const float* four = four_of(sums, i);
    return make_float4(four[0], four[1], four[2], four[3]);
  }

  // Store sums, leave them as a part of a result, or add up those of a cluster.
  __device__ __forceinline__ void finish(const Sums& sums, int result, bool complete) const {
    const int2 place = place_of_result<C>(p, result);
    if (p.split > 1) {
      join(sums, place);
      return;
    }
    float4* part = p.part_of(blockIdx.x, result, C::kEights * C::kConsumers);
#pragma unroll
    for (int i = 0; i < C::kEights; i += 2) {
      if (complete) {
        store_pair<C>(p, place, i, quadruple(sums, i), quadruple(sums, i + 1));
      } else {
        __stcg(part + i * C::kConsumers, quadruple(sums, i));
        __stcg(part + (i + 1) * C::kConsumers, quadruple(sums, i + 1));
      }
    }
  }

  // Every block of the cluster gets a share of the sums of all, adds them up and stores the result.
  __device__ __forceinline__ void join(const Sums& sums, int2 place) const {
    constexpr int kPairs = C::kEights / 2;
    constexpr uint32_t kPart = C::kConsumers * 16;
    int split = p.split, rank = cluster_rank();
    asm volatile("" : "+r"(split), "+r"(rank));  // not computed before the products
    const auto first_of = [&](int owner) { return (owner * kPairs + split - 1) / split; };
    const int first = first_of(rank), last = first_of(rank + 1);
    if (threadIdx.x == 0) {
      barrier_expect(joined, (last - first) * 2 * (split - 1) * kPart);
    }
    cluster_meet();  // from here on, nobody needs what lies in the ring
    const uint32_t slot = ring + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < C::kEights; ++i) {
      const int owner = i / 2 * split / kPairs;
      const uint32_t to = slot + ((i - 2 * first_of(owner)) * split + rank) * kPart;
      if (owner == rank) {
        store_vector(to, quadruple(sums, i));
      } else {
        store_remote(map_shared(to, owner), four_of(sums, i), map_shared(joined, owner));
      }
    }
    barrier_wait(joined, 0);
#pragma unroll 1
    for (int i = 0; i < last - first; ++i) {
      float4 sum[2] = {};
#pragma unroll 2
      for (int part = 0; part < split; ++part) {
        add(sum[0], load_quadruple(slot + (2 * i * split + part) * kPart));
        add(sum[1], load_quadruple(slot + ((2 * i + 1) * split + part) * kPart));
      }
      store_pair<C>(p, place, 2 * (first + i), sum[0], sum[1]);
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kBound, 1) q_wgmma(const __grid_constant__ Deal p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t ring = shared_address(shared), come = ring + C::kBarriersAt;
  constexpr int kBarriers = 8 * C::kStages;
  const Worker<C> worker{
      p, ring, come, come + kBarriers, come + 2 * kBarriers, come + 3 * kBarriers};
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(worker.come + 8 * s, 1);
      barrier_init(worker.full + 8 * s, 1 + max(C::kOrderers, 1));  // warps: of weights, of x
      barrier_init(worker.empty + 8 * s, C::kConsumers / 32);
    }
    barrier_init(worker.joined, 1);
    barriers_ready();
  }
  __syncthreads();
  let_next_kernel_start();
  if (threadIdx.x >= C::kConsumers) {
    give_registers<C::kGive>();
    worker.produce((threadIdx.x - C::kConsumers) / 32);
    __syncwarp();
  } else {
    take_registers<C::kTake>();
    worker.consume();
  }
#endif
}

// y = the sums of the parts of results that several blocks share, of C, which is Results; block
// (i / 2, result).
template <typename C>
__global__ void __launch_bounds__(C::kConsumers) add_parts(const __grid_constant__ Deal p) {
  let_next_kernel_start();
  constexpr int kPairs = C::kEights / 2;
  const int i = blockIdx.x % kPairs * 2, result = blockIdx.x / kPairs;
  const int first = p.block_of(result * p.stages);
  const int last = p.block_of((result + 1) * p.stages - 1);
  const float4* part = p.part_of(first, result, C::kEights * C::kConsumers) + i * C::kConsumers;
  wait_for_previous_kernel();
  if (first == last) {
    return;
  }
  float4 sum[2] = {};
#pragma unroll 4
  for (int block = first; block <= last; ++block) {
    add(sum[0], __ldcg(part));
    add(sum[1], __ldcg(part + C::kConsumers));
    part += C::kEights * C::kConsumers;
  }
  store_pair<C>(p, place_of_result<C>(p, result), i, sum[0], sum[1]);
}

}  // namespace auto_gptq
