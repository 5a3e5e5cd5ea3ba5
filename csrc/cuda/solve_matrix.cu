// A thousand columns solved in one launch.  Rows do not depend on each other, so a block takes some
// rows through all columns, 128 at a time: the errors of all columns before go to these 128 in
// products on the tensor cores (TF32), grids are fitted to what they have become if groups go in
// order, and the columns are quantized one by one.  No row's result depends on which others are with
// it.
//
// Every block of rows reads the whole factor, so beyond some thousand columns cuBLAS is faster with
// what goes from one launch to the next.
#include "device.h"
#include "mma.cuh"
#include "solve.cuh"

namespace auto_gptq {
namespace {

constexpr int kColumns = 128;  // solved between two products
constexpr int kDepth = 32;     // columns before them whose errors arrive in one stage
constexpr int kStages = 3;
constexpr int kRegisters = 32;      // columns that a thread holds in registers at a time
constexpr int kShare = 4;           // threads per row
constexpr int kWarpRows = 32;       // a warp multiplies 32 rows x 32 columns
constexpr int kPad = 8;             // floats: four rows of a stage lie in different banks
constexpr int kMostGroups = 32;     // in 128 columns
constexpr int kSmallestGroup = kColumns / kMostGroups;

template <int ROWS>
struct Stage {
  float factor[kDepth][kColumns + kPad];
  float errors[kDepth][ROWS + kPad];
};

template <int ROWS>
struct Columns {
  float diagonal[kColumns][kColumns];  // the factor's block on the diagonal
  float errors[kRegisters][ROWS];
  float least[kShare][ROWS];  // the least error that a thread has found, and by which factor
  int best[kShare][ROWS];
};

// With 64 rows two blocks share a multiprocessor, by a margin of 1 KB each.
template <int ROWS>
struct Memory {
  union {
    Stage<ROWS> stages[kStages];  // for the products
    Columns<ROWS> now;            // after them
  };
  float weight[kColumns][ROWS];
  float importance[kColumns];
  int64_t group[kColumns];
};

struct Task {
  Block block;
  Fit fit;      // group_size 0: the grids are given
  float* loss;  // out [N]
};

// c += a b, 16 x 8 x 8.  Of the operands only the upper 19 bits are read.
__device__ __forceinline__ void mma_tf32(
    float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

// Round to 11 bits once what would be cut off.
__device__ __forceinline__ float to_tf32(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
}

// Copy rows of four-float pieces, zeros where there is nothing to copy.
template <int ROWS, int FLOATS, int PITCH>
__device__ __forceinline__ void copy_tile(float* to,
                                          const float* from,
                                          int64_t stride,
                                          int rows,      // that exist
                                          int64_t left)  // floats that exist
{
  constexpr int kPieces = FLOATS / 4;
  for (int i = threadIdx.x; i < ROWS * kPieces; i += blockDim.x) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool exists = row < rows && 4 * piece < left;
    copy_or_clear(shared_address(to + row * PITCH + 4 * piece),
                  exists ? from + row * stride + 4 * piece : from, exists);
  }
}

// Take out of the weight what the errors of all columns before `first` ask for.
template <int ROWS>
__device__ __forceinline__ void make_up(const Block& block, Memory<ROWS>& shared, int first) {
  const int64_t n0 = blockIdx.x * int64_t{ROWS};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 4 * kWarpRows + lane / 4 * 4;  // the first of four
  const int column = warp % 4 * 32;
  const int stages = first / kDepth;
  const auto fetch = [&](int s) {
    if (s < stages) {
      Stage<ROWS>& stage = shared.stages[s % kStages];
      const int64_t k = int64_t{s} * kDepth;
      copy_tile<kDepth, kColumns, kColumns + kPad>(
          stage.factor[0], block.inverse + k * block.inverse_stride + first, block.inverse_stride,
          kDepth, block.columns - first);
      copy_tile<kDepth, ROWS, ROWS + kPad>(stage.errors[0], block.errors + k * block.n + n0,
                                           block.n, kDepth, block.n - n0);
    }
    end_group();
  };
  float sum[2][4][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    fetch(s);
  }
  for (int s = 0; s < stages; ++s) {
    wait_for_groups<kStages - 2>();
    __syncthreads();
    fetch(s + kStages - 1);
    const Stage<ROWS>& stage = shared.stages[s % kStages];
#pragma unroll
    for (int step = 0; step < kDepth / 8; ++step) {
      const int k = 8 * step + lane % 4;
      const float4 e = *reinterpret_cast<const float4*>(&stage.errors[k][row]);
      const float4 f = *reinterpret_cast<const float4*>(&stage.errors[k + 4][row]);
      const float4 u = *reinterpret_cast<const float4*>(&stage.factor[k][column + lane / 4 * 4]);
      const float4 v =
          *reinterpret_cast<const float4*>(&stage.factor[k + 4][column + lane / 4 * 4]);
      const float low[4] = {to_tf32(u.x), to_tf32(u.y), to_tf32(u.z), to_tf32(u.w)};
      const float high[4] = {to_tf32(v.x), to_tf32(v.y), to_tf32(v.z), to_tf32(v.w)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mma_tf32(sum[0][j], e.x, e.y, f.x, f.y, low[j], high[j]);
        mma_tf32(sum[1][j], e.z, e.w, f.z, f.w, low[j], high[j]);
      }
    }
  }
  wait_for_groups<0>();
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float* at = &shared.weight[column + 4 * (lane % 4 * 2 + odd) + j][row];
      float4 w = *reinterpret_cast<float4*>(at);
      w.x -= sum[0][j][odd];
      w.y -= sum[0][j][odd + 2];
      w.z -= sum[1][j][odd];
      w.w -= sum[1][j][odd + 2];
      *reinterpret_cast<float4*>(at) = w;
    }
  }
}

// Fit grids to the groups of these columns; the four threads of a row share the factors.
template <int ROWS>
__device__ __forceinline__ void fit_groups(
    const Fit& fit, Memory<ROWS>& shared, int first, int columns) {
  const int row = threadIdx.x % ROWS, share = threadIdx.x / ROWS;
  const int64_t n = blockIdx.x * int64_t{ROWS} + row;
  const int size = static_cast<int>(fit.group_size);
  const float maxq = static_cast<float>((1 << fit.bits) - 1);
  for (int start = 0; start < columns; start += size) {
    const int stop = min(start + size, columns);
    float lowest = 0.0f, highest = 0.0f;
#pragma unroll 8
    for (int i = start; i < stop; ++i) {
      lowest = fminf(lowest, shared.weight[i][row]);
      highest = fmaxf(highest, shared.weight[i][row]);
    }
    float least = INFINITY;
    int best = 0;
    for (int f = share; f < fit.candidates; f += kShare) {
      float scale, zero, error = 0.0f;
      span(fit, lowest, highest, fit.factors[f], scale, zero);
      const float inverse = __frcp_rn(scale);
#pragma unroll 8
      for (int i = start; i < stop; ++i) {
        const float w = shared.weight[i][row];
        const float code = fminf(fmaxf(round_to_even(w * inverse) + zero, 0.0f), maxq);
        const float missed = w - (code - zero) * scale;
        error += shared.importance[i] * (missed * missed);
      }
      if (error < least) {
        least = error;
        best = f;
      }
    }
    shared.now.least[share][row] = least;
    shared.now.best[share][row] = best;
    __syncthreads();
    if (share == 0 && n < fit.n) {
      for (int other = 1; other < kShare && other < fit.candidates; ++other) {
        const float error = shared.now.least[other][row];
        const int f = shared.now.best[other][row];
        if (error < least || (error == least && f < best)) {
          least = error;
          best = f;
        }
      }
      float scale, zero;
      span(fit, lowest, highest, fit.factors[best], scale, zero);
      const int64_t group = shared.group[start];
      fit.scales[group * fit.n + n] = scale;
      fit.zeros[group * fit.n + n] = zero;
    }
    __syncthreads();
  }
}

// Quantize the columns one by one: a thread per row holds 32 of them in registers; then all threads
// take the errors of these to the columns behind them.  The chain from one column to the next is
// what takes time, so nothing in it divides, and grids are fetched before it begins.
template <int ROWS>
__device__ __forceinline__ float quantize(
    const Block& block, const Fit& fit, Memory<ROWS>& shared, int from, int columns) {
  const int row = threadIdx.x % ROWS, share = threadIdx.x / ROWS;
  const int64_t n = blockIdx.x * int64_t{ROWS} + row;
  const bool inside = n < block.n;
  const int64_t at = inside ? n : 0;
  const float maxq = static_cast<float>(block.maxq);
  float scale[kRegisters], zero[kRegisters];
  const auto fetch_grids = [&](int first) {
    if (share == 0 && first < columns) {
#pragma unroll
      for (int c = 0; c < kRegisters; ++c) {
        const int64_t group = shared.group[first + c];
        scale[c] = fit.scales[group * block.n + at];
        zero[c] = fit.zeros[group * block.n + at];
      }
    }
  };
  float loss = 0.0f;
  fetch_grids(0);
  for (int first = 0; first < columns; first += kRegisters) {
    if (share == 0) {
      float w[kRegisters];
#pragma unroll
      for (int c = 0; c < kRegisters; ++c) {
        w[c] = shared.weight[first + c][row];
      }
#pragma unroll
      for (int c = 0; c < kRegisters; ++c) {
        const int i = first + c;
        float error = 0.0f;
        if (i < columns) {
          const float* factors = shared.now.diagonal[i] + first;
          const float whole = round_to_even(w[c] * __frcp_rn(scale[c]));
          const float code = fminf(fmaxf(whole + zero[c], 0.0f), maxq);
          error = (w[c] - (code - zero[c]) * scale[c]) * __frcp_rn(factors[c]);
#pragma unroll
          for (int later = c + 1; later < kRegisters; ++later) {
            w[later] -= error * factors[later];
          }
          loss += error * error;
          if (inside) {
            const int64_t to = (from + i) * block.n + n;
            block.codes[to] = static_cast<uint8_t>(code);
            block.errors[to] = to_tf32(error);
            block.weight[to] = w[c];
          }
        }
        shared.now.errors[c][row] = error;
      }
    }
    fetch_grids(first + kRegisters);
    __syncthreads();
    if (first + kRegisters < columns) {
      float error[kRegisters];
#pragma unroll
      for (int c = 0; c < kRegisters; ++c) {
        error[c] = shared.now.errors[c][row];
      }
      for (int j = first + kRegisters + 4 * share; j < columns; j += 4 * kShare) {
        float later[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          later[c] = shared.weight[j + c][row];
        }
#pragma unroll
        for (int c = 0; c < kRegisters; ++c) {
          const float4 factor =
              *reinterpret_cast<const float4*>(&shared.now.diagonal[first + c][j]);
          later[0] -= error[c] * factor.x;
          later[1] -= error[c] * factor.y;
          later[2] -= error[c] * factor.z;
          later[3] -= error[c] * factor.w;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          shared.weight[j + c][row] = later[c];
        }
      }
    }
    __syncthreads();
  }
  return loss;
}

template <int ROWS>
__global__ void __launch_bounds__(kShare* ROWS, ROWS == 64 ? 2 : 1)
    solve_matrix_kernel(Task task) {
  extern __shared__ __align__(16) float memory[];
  Memory<ROWS>& shared = *reinterpret_cast<Memory<ROWS>*>(memory);
  const Block& block = task.block;
  const int64_t n0 = blockIdx.x * int64_t{ROWS};
  wait_for_previous_kernel();
  float loss = 0.0f;
  for (int first = 0; first < block.columns; first += kColumns) {
    const int columns = static_cast<int>(min(int64_t{kColumns}, block.columns - first));
    copy_tile<kColumns, ROWS, ROWS>(shared.weight[0], block.weight + first * block.n + n0, block.n,
                                    columns, block.n - n0);
    for (int i = threadIdx.x; i < kColumns; i += blockDim.x) {
      shared.group[i] = i < columns ? block.group[first + i] : 0;
      shared.importance[i] = i < columns ? task.fit.importance[first + i] : 0.0f;
    }
    make_up(block, shared, first);
    __syncthreads();
    copy_tile<kColumns, kColumns, kColumns>(
        shared.now.diagonal[0], block.inverse + first * block.inverse_stride + first,
        block.inverse_stride, columns, block.columns - first);
    end_group();
    if (task.fit.group_size != 0) {
      fit_groups(task.fit, shared, first, columns);
    }
    wait_for_groups<0>();
    __syncthreads();
    loss += quantize(block, task.fit, shared, first, columns);
  }
  if (threadIdx.x < ROWS && n0 + threadIdx.x < block.n) {
    task.loss[n0 + threadIdx.x] = loss;
  }
}

template <int ROWS>
const char* start(const Task& task, void* stream) {
  const dim3 blocks(static_cast<unsigned>((task.block.n + ROWS - 1) / ROWS));
  return launch<Task>(solve_matrix_kernel<ROWS>, task, blocks, kShare * ROWS, sizeof(Memory<ROWS>),
                      static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_solve_matrix(const Block* block,
                                        const Fit* fit,
                                        float* loss,
                                        void* stream) {
  if (block->columns == 0 || block->n == 0) return nullptr;
  const Device& device = current_device();
  if (device.sm < 80) return "it needs compute capability 8.0";
  if (fit->group_size != 0 && (fit->group_size < kSmallestGroup || kColumns % fit->group_size)) {
    return "the group size does not divide 128";
  }
  const Task task{*block, *fit, loss};
  // As few rows per block as can all run at once: then the fewest wait for each other's columns.
  const int64_t at_once = device.processors;
  if (block->n <= 32 * at_once || device.shared_bytes < int64_t{sizeof(Memory<64>)}) {
    return start<32>(task, stream);
  }
  if (block->n <= 64 * 2 * at_once || device.shared_bytes < int64_t{sizeof(Memory<128>)}) {
    return start<64>(task, stream);
  }
  return start<128>(task, stream);
}
