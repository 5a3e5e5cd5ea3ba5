// y = x W^T for hundreds of rows of x, on the tensor cores of Hopper.
//
// A block computes 128 outputs for ROWS rows of x, two blocks of a cluster neighbouring outputs for
// the same rows: each fetches half of the rows for both.  The product is transposed, so that the
// weight is the operand that comes from registers.  Four warps of producers keep a ring of stages
// full, a stage being 64 inputs of x, tiles and grids.  Two warpgroups of consumers have 64 outputs
// each; they turn codes into numbers while the products of those before run.
#pragma once

#include <algorithm>

#include "hopper.cuh"
#include "mma.cuh"
#include "q_wide_work.cuh"
#include "tiles.cuh"
#include "warpgroup.cuh"

namespace auto_gptq::wide {

using namespace hopper;

constexpr int kConsumers = 256;
constexpr int kProducers = 128;
constexpr int kThreads = kConsumers + kProducers;
constexpr int kSharedBytes = 226 << 10;
constexpr int kBoxRows = 64;                // of y, stored at once
constexpr int kBox = kBoxRows * kSide * 2;  // bytes

template <int BITS, int ROWS, int SPANS>
struct Ring {
  static constexpr int kX = ROWS * 128;
  static constexpr int kTile = 512 * BITS;
  static constexpr int kStage = kX + kColumns / kSide * kTile;
  static constexpr int kZeros = SPANS * kColumns * 4;  // scales have up to 4 bytes
  static constexpr int kGrids = kZeros + SPANS * kColumns;
  static constexpr int kBoxes = 4 * kBox;  // two for each warpgroup
  static constexpr int kStages =
      std::min((kSharedBytes - 1024 - kBoxes) / (kStage + kGrids), 8);
  static constexpr int kGridsBegin = kStages * kStage + kBoxes;  // grids need no alignment to 1024
  static constexpr int kBytes = 1024 + kBoxes + kStages * (kStage + kGrids);
  static_assert(kStage % 1024 == 0 && kStages >= 3);
};

// Codes of 16 inputs per lane, runs of 64: give word s the inputs 16 s + 2 q + {0, 1, 8, 9}, what
// lane q multiplies with where x lies in its own order.  The four lanes of a row transpose what they
// have, in three steps, so that other work fills the time that words take from lane to lane.
struct OwnOrder {
  uint32_t (&w)[4];
  uint32_t (&moved)[2];
  bool high, odd;

  __device__ __forceinline__ void begin() const {
    const uint32_t u[4] = {__byte_perm(w[0], w[2], 0x6240), __byte_perm(w[0], w[2], 0x7351),
                           __byte_perm(w[1], w[3], 0x6240), __byte_perm(w[1], w[3], 0x7351)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      moved[i] = __shfl_xor_sync(0xffffffff, high ? u[i] : u[2 + i], 2);
      w[i] = high ? u[2 + i] : u[i];  // what stays
    }
  }

  __device__ __forceinline__ void go_on() const {
    const uint32_t t[4] = {high ? moved[0] : w[0], high ? moved[1] : w[1], high ? w[0] : moved[0],
                           high ? w[1] : moved[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      moved[i] = __shfl_xor_sync(0xffffffff, odd ? t[2 * i] : t[2 * i + 1], 1);
      w[i] = odd ? t[2 * i + 1] : t[2 * i];
    }
  }

  __device__ __forceinline__ void end() const {
    const uint32_t stay[2] = {w[0], w[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = odd ? moved[i] : stay[i];
      w[2 * i + 1] = odd ? stay[i] : moved[i];
    }
  }
};

template <int BITS, typename T, int ROWS, int SPANS>
struct Block {
  using R = Ring<BITS, ROWS, SPANS>;
  static constexpr bool kIsHalf = Pairs<T>::kMantissa == 10;
  const Task& task;
  const Product& p;
  Results<ROWS> results;
  uint8_t* ring;
  uint32_t address, full, empty;  // of the ring and of its barriers, in shared memory
  int rank;                       // in the cluster

  __device__ __forceinline__ int n_pad() const {
    return (static_cast<int>(p.weight.n) + kSide - 1) / kSide * kSide;
  }

  // Call copy(stage, barrier) for every stage of a part once it is empty.
  template <typename Copy>
  __device__ __forceinline__ void fill(const Part& part,
                                       Cursor<R::kStages>& at,
                                       uint32_t bytes,
                                       const Copy& copy) const {
#pragma unroll 1
    for (int tile = part.begin; tile < part.end; ++tile) {
      const uint32_t barrier = full + 8 * at.stage;
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      barrier_expect(barrier, bytes);
      copy(at.stage, barrier);
      at.advance();
    }
  }

  // Half of the rows for both blocks of the cluster.
  __device__ __forceinline__ void produce_x() const {
    Cursor<R::kStages> at;
    wait_for_previous_kernel();
    for_parts(task.work, results.stages, [&](const Part& part) {
      int column = part.begin * task.x_columns;
      int row = part.begin * task.x_rows + results.place_of(part.result).m + rank * (ROWS / 2);
      fill(part, at, R::kX, [&](int stage, uint32_t barrier) {
        box_copy(address + stage * R::kStage + rank * (R::kX / 2), &task.x, column, row, barrier, 3);
        column += task.x_columns;
        row += task.x_rows;
      });
    });
  }

  // One of the two tiles of a stage.
  __device__ __forceinline__ void produce_tiles(int which) const {
    Cursor<R::kStages> at;
    for_parts(task.work, results.stages, [&](const Part& part) {
      const int n = results.place_of(part.result).n + rank * kColumns + which * kSide;
      const uint32_t bytes = n < p.weight.n ? R::kTile : 0;
      const uint32_t* from =
          p.weight.tiles + (int64_t{n / kSide} * results.stages + part.begin) * (R::kTile / 4);
      fill(part, at, bytes, [&](int stage, uint32_t barrier) {
        if (bytes) {
          bulk_copy(address + stage * R::kStage + R::kX + which * R::kTile, from, R::kTile, barrier);
        }
        from += R::kTile / 4;
      });
    });
  }

  __device__ __forceinline__ void produce_grids() const {
    const int scale_bytes = p.weight.scale_type == kFloat32 ? 4 : 2;
    const int size = static_cast<int>(p.weight.group_size);
    const int last = static_cast<int>(p.weight.groups) - 1;
    Cursor<R::kStages> at;
    for_parts(task.work, results.stages, [&](const Part& part) {
      const int n = results.place_of(part.result).n + rank * kColumns;
      const int columns = max(min(n_pad() - n, kColumns), 0);
      int group = part.begin * kSide / size, left = size - part.begin * kSide % size;
      fill(part, at, SPANS * columns * (scale_bytes + (p.weight.zeros ? 1 : 0)),
           [&](int stage, uint32_t barrier) {
             uint32_t to = address + R::kGridsBegin + stage * R::kGrids;
#pragma unroll 1
             for (int s = 0; s < SPANS; ++s) {
               if (columns) {
                 const int64_t from = int64_t{min(group, last)} * n_pad() + n;
                 bulk_copy(to + s * (kColumns * 4),
                           static_cast<const uint8_t*>(p.weight.scales) + from * scale_bytes,
                           columns * scale_bytes, barrier);
                 if (p.weight.zeros) {
                   bulk_copy(to + R::kZeros + s * kColumns, p.weight.zeros + from, columns,
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

  // A stage's weights on their way out of shared memory: as they lie there, then ready to decode.
  struct Fetched {
    LaneCodes<BITS> codes;
    uint32_t moved[2];
    uint32_t scale[SPANS][2], shift[SPANS][2];  // of two outputs, eight apart
  };

  __device__ __forceinline__ OwnOrder order_of(Fetched& f) const {
    return {reinterpret_cast<uint32_t(&)[4]>(f.codes.word), f.moved, (threadIdx.x & 2) != 0,
            (threadIdx.x & 1) != 0};
  }

  // What is to be done between the products of step s - 1 and s, before the next stage begins.
  __device__ __forceinline__ void fetch(int s, int stage, Fetched& f) const {
    if (s == 0) {
      load(stage, f);
    } else if (s == 3) {
      finish_grids(f);
    }
    if constexpr (takes_own_order(BITS, SPANS)) {
      if (s > 0) {
        const OwnOrder order = order_of(f);
        s == 1 ? order.begin() : s == 2 ? order.go_on() : order.end();
      }
    }
  }

  __device__ __forceinline__ void load(int stage, Fetched& f) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = warp * 16 + lane / 4;  // warps lie along the outputs
    const uint8_t* grid = ring + R::kGridsBegin + stage * R::kGrids;
    f.codes = read_codes<BITS>(ring + stage * R::kStage + R::kX + warp / 4 * R::kTile, warp % 4,
                               lane);
#pragma unroll
    for (int i = 0; i < SPANS * 2; ++i) {
      const uint8_t* scales = grid + i / 2 * kColumns * 4;
      const int at = column + i % 2 * 8;
      f.scale[i / 2][i % 2] = p.weight.scale_type == kFloat32
                                  ? reinterpret_cast<const uint32_t*>(scales)[at]
                                  : reinterpret_cast<const uint16_t*>(scales)[at];
      f.shift[i / 2][i % 2] =
          p.weight.zeros ? grid[R::kZeros + i / 2 * kColumns + at] : 1 << (BITS - 1);
    }
  }

  // Scales as pairs of T, zero points as what takes them off.
  __device__ __forceinline__ void finish_grids(Fetched& f) const {
    constexpr DataType own = kIsHalf ? kFloat16 : kBFloat16;
#pragma unroll
    for (int i = 0; i < SPANS * 2; ++i) {
      uint32_t& scale = f.scale[i / 2][i % 2];
      if (p.weight.scale_type == own) {
        scale = twice(scale);
      } else if (p.weight.scale_type == kFloat32) {
        scale = Pairs<T>::constant(__uint_as_float(scale));
      } else {  // of the other 16-bit type
        scale = Pairs<T>::constant(kIsHalf ? __uint_as_float(scale << 16)
                                           : __half2float(__ushort_as_half(scale)));
      }
      uint32_t& shift = f.shift[i / 2][i % 2];
      if constexpr (BITS == 4) {  // minus (magic + zero), or a sixteenth of magic + 16 zero
        shift = twice(kIsHalf && i % 2 ? 0xd400 + shift * 16 : (Pairs<T>::kMagic | 0x8000) + shift);
      } else {
        shift = Pairs<T>::constant(static_cast<float>((1 << (BITS - 1)) - static_cast<int>(shift)));
      }
    }
  }

  // No branches: the compiler would not let products run meanwhile.
  __device__ __forceinline__ void decode_step(const Fetched& f, int s, uint32_t (&a)[4]) const {
    if constexpr (BITS == 4) {
      decode_four(f, s, a);
    } else {
      decode<BITS, T>(f.codes, s, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = Pairs<T>::add(a[i], f.shift[s * SPANS / 4][i % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = Pairs<T>::fma(a[i], f.scale[s * SPANS / 4][i % 2], 0x80008000u);
    }
  }

  __device__ __forceinline__ void decode_four(const Fetched& f, int s, uint32_t (&a)[4]) const {
    const uint32_t magic = twice(Pairs<T>::kMagic), word = f.codes.word[s];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t shift = f.shift[s * SPANS / 4][i % 2];
      if (kIsHalf && i % 2) {  // codes in bits 4 to 7 as they are
        a[i] = Pairs<T>::fma(masked_or(word >> (i / 2 * 8), 0x00f000f0, magic),
                             Pairs<T>::constant(1.0f / 16), shift);
      } else {
        a[i] = Pairs<T>::add(masked_or(word >> (4 * i), 0x000f000f, magic), shift);
      }
    }
  }

  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 < 2) {
      barrier_arrive_remote(empty + 8 * stage, threadIdx.x % 32);
    }
  }

  __device__ __forceinline__ void consume() const {
    float sums[ROWS / 2];
    uint32_t a[4][4];  // the weights of each step of a stage
    Fetched f, next;
    Cursor<R::kStages> at;
    for_parts(task.work, results.stages, [&](const Part& part) {
      const int count = part.end - part.begin;
      int before = -1, stage = at.stage;
      barrier_wait(full + 8 * at.stage, at.parity);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        fetch(s, stage, f);
      }
      decode_step(f, 0, a[0]);
      at.advance();
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const bool is_last = i + 1 == count;
        const uint64_t rows = rows_descriptor(address + stage * R::kStage);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          asm volatile("" : "+r"(a[s][0]), "+r"(a[s][1]), "+r"(a[s][2]), "+r"(a[s][3])::"memory");
          mma_fence();
          hopper::mma<ROWS, !kIsHalf>(sums, a[s], rows + 2 * s, s > 0 || i > 0);
          mma_commit();
          mma_wait<2>();
          if (s == 0 && !is_last) {
            barrier_wait(full + 8 * at.stage, at.parity);
          }
          fetch(s, at.stage, next);  // if this is the last stage, numbers that nobody needs
          if (s < 3) {
            decode_step(f, s + 1, a[s + 1]);
          } else {
            if (before >= 0) {
              release(before);
            }
            f = next;
            decode_step(f, 0, a[0]);
          }
        }
        before = stage;
        if (!is_last) {
          stage = at.stage;
          at.advance();
        }
      }
      mma_wait<0>();
      release(before);
      if (part.slot < 0) {
        store(sums, results.place_of(part.result));
      } else {
        store_part(sums, part.slot);
      }
    });
    if (threadIdx.x % 128 == 0) {
      box_stores_read<0>();
    }
  }

  __device__ __forceinline__ void wait_for_group() const {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + static_cast<int>(threadIdx.x) / 128) : "memory");
  }

  // A warpgroup's sums, 64 outputs of ROWS rows, to y through shared memory.
  __device__ __forceinline__ void store(const float (&sums)[ROWS / 2], const Place& place) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int output = place.n + rank * kColumns + warp / 4 * kSide;
    float bias[2] = {0, 0};
    if (p.bias) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = output + warp % 4 * 16 + h * 8 + lane / 4;
        bias[h] = n < p.weight.n ? static_cast<float>(static_cast<const T*>(p.bias)[n]) : 0.0f;
      }
    }
    const uint32_t box = address + R::kStages * R::kStage + warp / 4 * 2 * kBox;
    // Where this lane's row of 8 outputs goes: of four matrices, lower and upper outputs of 8 rows.
    const int chunk = (warp % 4 * 2 + lane / 8 % 2) ^ (lane % 8);
    const uint32_t to = box + (lane / 16 * 8 + lane % 8) * 128 + chunk * 16;
#pragma unroll
    for (int b = 0; b < ROWS / kBoxRows; ++b) {
      if (threadIdx.x % 128 == 0) {
        box_stores_read<1>();
      }
      wait_for_group();
#pragma unroll
      for (int i = 0; i < kBoxRows / 16; ++i) {
        const float* v = sums + b * kBoxRows / 2 + i * 8;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + b % 2 * kBox + i * 16 * 128),
                     "r"(pack<T>(v[0] + bias[0], v[1] + bias[0])),
                     "r"(pack<T>(v[2] + bias[1], v[3] + bias[1])),
                     "r"(pack<T>(v[4] + bias[0], v[5] + bias[0])),
                     "r"(pack<T>(v[6] + bias[1], v[7] + bias[1]))
                     : "memory");
      }
      publish_shared();
      wait_for_group();
      if (threadIdx.x % 128 == 0) {
        box_store(&task.y, output, place.m + b * kBoxRows, box + b % 2 * kBox);
      }
    }
  }

  __device__ __forceinline__ void store_part(const float (&sums)[ROWS / 2], int slot) const {
    float4* to = task.parts +
                 ((slot * 2 + rank) * 2 + threadIdx.x / 128) * (ROWS / 8 * 128) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
      to[i * 128] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
  }
};

template <int BITS, typename T, int ROWS, int SPANS>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    q_wide(const __grid_constant__ Task task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using R = Ring<BITS, ROWS, SPANS>;
  extern __shared__ uint8_t shared[];
  __shared__ alignas(8) uint64_t barriers[2 * R::kStages];
  let_next_kernel_start();
  const uint32_t address = (shared_address(shared) + 1023) / 1024 * 1024;
  const Block<BITS, T, ROWS, SPANS> block{task,
                                          task.p,
                                          Results<ROWS>(task.p),
                                          shared + (address - shared_address(shared)),
                                          address,
                                          shared_address(barriers),
                                          shared_address(barriers) + 8 * R::kStages,
                                          cluster_rank()};
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kStages; ++s) {
      barrier_init(block.full + 8 * s, kProducers / 32);       // one lane of each
      barrier_init(block.empty + 8 * s, 2 * kConsumers / 32);  // the warps of two blocks
    }
    barriers_ready();
  }
  cluster_sync();
  if (threadIdx.x >= kConsumers) {
    give_registers<40>();
    if (threadIdx.x % 32 == 0) {
      const int warp = (threadIdx.x - kConsumers) / 32;
      if (warp == 0) {
        block.produce_x();
      } else if (warp == 1) {
        block.produce_grids();
      } else {
        block.produce_tiles(warp - 2);
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    block.consume();
  }
  cluster_sync();  // the other block may still write here
#endif
}

}  // namespace auto_gptq::wide
