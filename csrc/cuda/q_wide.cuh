// y = x W^T for hundreds of rows of x, on the tensor cores of Hopper.
//
// A block computes 128 or 192 outputs for ROWS rows of x, a pair of blocks neighbouring outputs for
// the same rows: each fetches half of the rows for both.  Of some results two pairs compute some
// inputs each (q_wide_plan.h); sums go from one to the other through memory.  The product is
// transposed, so that the weight is the operand that comes from registers.  Warps of producers keep
// a ring of stages full, a stage being 64 inputs of x, tiles and grids.  Warpgroups of consumers
// have 64 outputs each; they turn codes into numbers while the products of those before run.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "hopper.cuh"
#include "mma.cuh"
#include "q_wide_codes.cuh"
#include "q_wide_plan.h"
#include "tiles.cuh"
#include "warpgroup.cuh"

namespace auto_gptq::wide {

using namespace hopper;

static_assert(kInputs == kSide);

struct Task {
  Product p;
  Work work;
  CUtensorMap x, y, tiles;
  // Sums of each block that gives some, and whether they are there: then its flag has a number that
  // no other launch uses.  Until then it has any content, which is that number once in 2^64 times.
  // Whoever takes the sums leaves a zero, for the next replay of a graph.
  uint8_t* sums;
  uint64_t* flags;
  uint64_t number;
};

constexpr int kProducers = 128;
constexpr int kSharedBytes = 226 << 10;

// ROWS of x and GROUPS warpgroups of consumers, each with 64 outputs.
template <int BITS, typename T, int SPANS, bool PLAIN, int ROWS, int GROUPS>
struct Block {
  static constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  static constexpr int kConsumers = 128 * GROUPS, kThreads = kConsumers + kProducers;
  static constexpr int kColumns = kSide * GROUPS;
  using G = Grids<kColumns, SPANS>;
  using Lane = Weights<BITS, T, SPANS, PLAIN>;

  // The ring: x and tiles of each stage, results on their way out, grids.
  static constexpr int kX = ROWS * 128, kTile = 512 * BITS;
  static constexpr int kStage = (kX + GROUPS * kTile + 1023) / 1024 * 1024;
  static constexpr int kBox = ROWS / 4 * kSide * 2;  // a quarter of a warpgroup's results
  static constexpr int kBoxes = 2 * GROUPS * kBox;
  static constexpr int kStages = std::min((kSharedBytes - 1024 - kBoxes) / (kStage + G::kBytes), 8);
  static constexpr int kGridsBegin = kStages * kStage + kBoxes;  // need no alignment to 1024
  static constexpr int kBytes = 1024 + kBoxes + kStages * (kStage + G::kBytes);
  static_assert(kStages >= 3);

  // Sums of another block come through the ring, in place of x: so many from each lane at a time.
  static constexpr int kQuads = kX / (16 * kConsumers) / 2 * 2, kSums = kQuads * 16 * kConsumers;
  static constexpr int kTakes = ROWS / 8 / kQuads;
  static_assert(kTakes * kQuads == ROWS / 8);

  const Task& task;
  const Product& p;
  uint8_t* ring;
  uint32_t address, full, empty;  // of the ring and of its barriers, in shared memory
  int rank;                       // in the pair
  uint32_t place, column;         // of a lane: its codes in a tile, its first output

  __device__ __forceinline__ int n_pad() const {
    return (static_cast<int>(p.weight.n) + kSide - 1) / kSide * kSide;
  }

  template <typename Do>
  __device__ __forceinline__ void for_parts(const Do& act) const {
    Part part;
#pragma unroll 1
    for (int turn = 0; part_of(task.work, blockIdx.x, turn, part); ++turn) {
      act(part);
    }
  }

  // Call copy(stage, barrier) for so many stages once each is empty.
  template <typename Copy>
  __device__ __forceinline__ void fill(int count,
                                       Cursor<kStages>& at,
                                       uint32_t bytes,
                                       const Copy& copy) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const uint32_t barrier = full + 8 * at.stage;
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      barrier_expect(barrier, bytes);
      copy(at.stage, barrier);
      at.advance();
    }
  }

  // The same for the stages of a part; those with another block's sums remain.
  template <typename Copy>
  __device__ __forceinline__ void fill(const Part& part,
                                       Cursor<kStages>& at,
                                       uint32_t bytes,
                                       const Copy& copy) const {
    fill(part.end - part.begin, at, bytes, copy);
    fill(part.takes ? kTakes : 0, at, 0, [](int, uint32_t) {});
  }

  // Half of the rows for both blocks of the pair, then sums for this one.
  __device__ __forceinline__ void produce_x() const {
    Cursor<kStages> at;
    wait_for_previous_kernel();
    for_parts([&](const Part& part) {
      int k = part.begin * kSide;
      fill(part.end - part.begin, at, kX, [&](int stage, uint32_t barrier) {
        box_copy(address + stage * kStage + rank * (kX / 2), &task.x, k, part.m + rank * (ROWS / 2),
                 barrier, 3);
        k += kSide;
      });
      if (part.takes) {
        const int giver = blockIdx.x - 2;
        const uint8_t* from = task.sums + int64_t{giver} * (kTakes * kSums);
        wait_for_flag(task.flags + giver, task.number);
        fill(kTakes, at, kSums, [&](int stage, uint32_t barrier) {
          bulk_copy(address + stage * kStage, from, kSums, barrier);
          from += kSums;
        });
      }
    });
    for (int i = 0; i < kStages; ++i) {  // until the other block writes here no more
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      at.advance();
    }
  }

  // One of the tiles of a stage.
  __device__ __forceinline__ void produce_tiles(int which) const {
    Cursor<kStages> at;
    for_parts([&](const Part& part) {
      const int n = part.n + which * kSide;
      const uint32_t bytes = n < p.weight.n ? kTile : 0;
      int line = (n / kSide * task.work.stages + part.begin) * (kTile / 128);
      fill(part, at, bytes, [&](int stage, uint32_t barrier) {
        if (bytes) {
          box_copy(address + stage * kStage + kX + which * kTile, &task.tiles, 0, line, barrier,
                   1 << rank);
        }
        line += kTile / 128;
      });
    });
  }

  __device__ __forceinline__ void produce_grids() const {
    const int scale_bytes = p.weight.scale_type == kFloat32 ? 4 : 2;
    const int size = static_cast<int>(p.weight.group_size);
    const int last = static_cast<int>(p.weight.groups) - 1;
    Cursor<kStages> at;
    for_parts([&](const Part& part) {
      const int n = part.n, columns = max(min(n_pad() - n, kColumns), 0);
      int group = part.begin * kSide / size, left = size - part.begin * kSide % size;
      fill(part, at, SPANS * columns * (scale_bytes + (p.weight.zeros ? 1 : 0)),
           [&](int stage, uint32_t barrier) {
             uint32_t to = address + kGridsBegin + stage * G::kBytes;
#pragma unroll 1
             for (int s = 0; s < SPANS; ++s) {
               if (columns) {
                 const int64_t from = int64_t{min(group, last)} * n_pad() + n;
                 bulk_copy(to + s * G::kSpan,
                           static_cast<const uint8_t*>(p.weight.scales) + from * scale_bytes,
                           columns * scale_bytes, barrier);
                 if (p.weight.zeros) {
                   bulk_copy(to + G::kZeros + s * kColumns, p.weight.zeros + from, columns,
                             barrier);
                 }
               }
               left -= kSide / SPANS;
               if (left == 0) {
                 left = size;
                 ++group;
               }
             }
           });
    });
  }

  // A stage is empty: tell both blocks.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 < 2) {
      barrier_arrive_remote(empty + 8 * stage, threadIdx.x % 32);
    }
  }

  // The operands of the steps of a stage.
  __device__ __forceinline__ void decode(int stage, uint32_t (&a)[4][4]) const {
    Lane lane;
    lane.template load<G>(p.weight, address + stage * kStage + kX + threadIdx.x / 128 * kTile,
                          place, address + kGridsBegin + stage * G::kBytes, column);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      lane.decode_step(s, a[s]);
    }
  }

  // While the products of a stage run, the operands of the next one are made.
  __device__ __forceinline__ void consume() const {
    float sums[ROWS / 2];
    uint32_t even[4][4], odd[4][4];  // the operands of the steps of every other stage
    Cursor<kStages> at;
    Part part, following;
    if (!part_of(task.work, blockIdx.x, 0, part)) {
      return;
    }
    int stage = 0;
    barrier_wait(full, 0);
    decode(0, even);
    at.advance();
    bool goes_on;
    int turn = 0;
#pragma unroll 1
    do {
      goes_on = part_of(task.work, blockIdx.x, ++turn, following);
      const int count = part.end - part.begin;
      int before = -1;
      const auto multiply = [&](int i, uint32_t (&a)[4][4], uint32_t (&next)[4][4]) {
        const bool is_last = !goes_on && i + 1 == count;
        const uint64_t rows = rows_descriptor(address + stage * kStage);
#pragma unroll
        for (int s = 0; s < 4; ++s) {  // they are what is multiplied
          asm volatile("" : "+r"(a[s][0]), "+r"(a[s][1]), "+r"(a[s][2]), "+r"(a[s][3])::"memory");
        }
        mma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          hopper::mma<ROWS, !kIsHalf>(sums, a[s], rows + 2 * s, s > 0 || i > 0);
        }
        mma_commit();
        mma_wait<1>();
        if (before >= 0) {
          release(before);
        }
        if (!is_last) {
          barrier_wait(full + 8 * at.stage, at.parity);
        }
        decode(at.stage, next);  // if this is the last stage, numbers that nobody needs
        before = stage;
        if (!is_last) {
          stage = at.stage;
          at.advance();
        }
      };
#pragma unroll 1
      for (int i = 0; i < count; i += 2) {
        multiply(i, even, odd);
        if (i + 1 < count) {
          multiply(i + 1, odd, even);
        }
      }
      mma_wait<0>();
      if (count % 2) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            even[s][i] = odd[s][i];
          }
        }
      }
      release(before);
      if (part.takes) {
        take(sums, at);
      }
      if (part.gives) {
        give(sums);
      } else {
        store(sums, part);
      }
      part = following;
    } while (goes_on);
    if (threadIdx.x % 128 == 0) {
      box_stores_read<0>();
    }
  }

  __device__ __forceinline__ void wait_for_group() const {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + static_cast<int>(threadIdx.x) / 128) : "memory");
  }

  // Leave sums for another block.
  __device__ __forceinline__ void give(const float (&sums)[ROWS / 2]) const {
    auto* to = reinterpret_cast<float4*>(task.sums + int64_t{blockIdx.x} * (kTakes * kSums));
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
      const float* v = sums + 4 * i;
      to[i * kConsumers + threadIdx.x] = make_float4(v[0], v[1], v[2], v[3]);
    }
    asm volatile("bar.arrive 8, %0;" ::"n"(kConsumers + 32) : "memory");
  }

  // Tell another block that its sums are there: a warp of its own waits until everybody sees them.
  __device__ __forceinline__ void tell() const {
    for_parts([&](const Part& part) {
      if (part.gives) {
        asm volatile("bar.sync 8, %0;" ::"n"(kConsumers + 32) : "memory");
        if (threadIdx.x % 32 == 0) {
          set_flag(task.flags + blockIdx.x, task.number);
        }
      }
    });
  }

  // Add another block's sums.
  __device__ __forceinline__ void take(float (&sums)[ROWS / 2], Cursor<kStages>& at) const {
#pragma unroll
    for (int t = 0; t < kTakes; ++t) {
      barrier_wait(full + 8 * at.stage, at.parity);
      const auto* from = reinterpret_cast<const float4*>(ring + at.stage * kStage) + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const float4 v = from[i * kConsumers];
        float* to = sums + 4 * (t * kQuads + i);
        to[0] += v.x;
        to[1] += v.y;
        to[2] += v.z;
        to[3] += v.w;
      }
      __syncwarp();
      release(at.stage);
      at.advance();
    }
  }

  // A warpgroup's sums, 64 outputs of ROWS rows, to y through shared memory.
  __device__ __forceinline__ void store(const float (&sums)[ROWS / 2], const Part& part) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int output = part.n + warp / 4 * kSide;
    float bias[2] = {0, 0};
    if (p.bias) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = output + warp % 4 * 16 + h * 8 + lane / 4;
        bias[h] = n < p.weight.n ? static_cast<float>(static_cast<const T*>(p.bias)[n]) : 0.0f;
      }
    }
    const uint32_t boxes = address + kStages * kStage + warp / 4 * 2 * kBox;
    // Where this lane's row of 8 outputs goes: of four matrices, lower and upper outputs of 8 rows.
    const int chunk = (warp % 4 * 2 + lane / 8 % 2) ^ (lane % 8);
    const uint32_t to = boxes + (lane / 16 * 8 + lane % 8) * 128 + chunk * 16;
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      if (threadIdx.x % 128 == 0) {
        box_stores_read<1>();
      }
      wait_for_group();
#pragma unroll
      for (int i = 0; i < ROWS / 64; ++i) {
        const float* v = sums + piece * ROWS / 8 + i * 8;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + piece % 2 * kBox + i * 16 * 128),
                     "r"(pack<T>(v[0] + bias[0], v[1] + bias[0])),
                     "r"(pack<T>(v[2] + bias[1], v[3] + bias[1])),
                     "r"(pack<T>(v[4] + bias[0], v[5] + bias[0])),
                     "r"(pack<T>(v[6] + bias[1], v[7] + bias[1]))
                     : "memory");
      }
      publish_shared();
      wait_for_group();
      if (threadIdx.x % 128 == 0) {
        box_store(&task.y, output, part.m + piece * ROWS / 4, boxes + piece % 2 * kBox);
      }
    }
  }
};

template <int BITS, typename T, int SPANS, bool PLAIN, int ROWS, int GROUPS>
__global__ void __cluster_dims__(2, 1, 1)
    __launch_bounds__(Block<BITS, T, SPANS, PLAIN, ROWS, GROUPS>::kThreads, 1)
        q_wide(const __grid_constant__ Task task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using B = Block<BITS, T, SPANS, PLAIN, ROWS, GROUPS>;
  extern __shared__ uint8_t shared[];
  __shared__ alignas(8) uint64_t barriers[2 * B::kStages];
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    prefetch_map(&task.x);
    prefetch_map(&task.tiles);
  }
  uint32_t address = (shared_address(shared) + 1023) / 1024 * 1024;
  uint32_t full = shared_address(barriers);
  uint8_t* const ring = shared + (address - shared_address(shared));
  uint32_t place = B::Lane::place(), column = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  // The compiler would find them out again and again.
  asm volatile("" : "+r"(address), "+r"(full), "+r"(place), "+r"(column));
  const B block{task,           task.p, ring,  address, full, full + 8 * B::kStages,
                cluster_rank(), place,  column};
  if (threadIdx.x == 0) {
    for (int s = 0; s < B::kStages; ++s) {
      barrier_init(full + 8 * s, 2 + GROUPS);                     // x, grids, and each tile
      barrier_init(block.empty + 8 * s, 2 * B::kConsumers / 32);  // the warps of two blocks
    }
    barriers_ready();
  }
  cluster_sync();
  if (threadIdx.x >= B::kConsumers) {
    give_registers<GROUPS == 4 ? 24 : 40>();
    const int warp = (threadIdx.x - B::kConsumers) / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      block.produce_x();
    } else if (warp == 1 && lane == 0) {
      block.produce_grids();
    } else if (warp == 2 && lane < GROUPS) {
      block.produce_tiles(lane);
    } else if (warp == 3) {
      block.tell();
    }
  } else {
    take_registers<GROUPS == 2 ? 232 : GROUPS == 3 ? 152 : 112>();
    block.consume();
  }
#endif
}

}  // namespace auto_gptq::wide
