// The two inner loops of the solver on a GPU: fitting grids to groups, and the GPTQ column loop.
//
// Compiled with contraction of a*b+c left on, like torch's own kernels, and with exact division.
#include "device.h"
#include "solve.cuh"

namespace auto_gptq {
namespace {

// ---- grids -------------------------------------------------------------------------------------

constexpr int kFitOutputs = 32;   // outputs per block: the threads of a warp, so loads are contiguous
constexpr int kMostWarps = 16;    // each tries one factor at a time
constexpr int kFitColumns = 128;  // of a group that lie in shared memory at a time

struct FitMemory {
  float weight[kFitColumns][kFitOutputs];
  float importance[kFitColumns];
  float lowest[kMostWarps][kFitOutputs];
  float highest[kMostWarps][kFitOutputs];
  float error[kMostWarps][kFitOutputs];
  int factor[kMostWarps][kFitOutputs];
};

// One block: one group of columns, kFitOutputs outputs; warps share columns, then factors.
__global__ void fit_grids_kernel(Fit fit) {
  __shared__ FitMemory shared;
  const int x = threadIdx.x, y = threadIdx.y, warps = blockDim.y;
  const int64_t n = blockIdx.x * int64_t{kFitOutputs} + x;
  const int64_t group = blockIdx.y;
  const int64_t first = group * fit.group_size;
  const int64_t last = min(first + fit.group_size, fit.columns);
  const float maxq = static_cast<float>((1 << fit.bits) - 1);
  const bool inside = n < fit.n;
  const float* weight = fit.weight + (inside ? n : 0);

  float lowest = 0.0f, highest = 0.0f;
#pragma unroll 8  // many loads in flight
  for (int64_t i = first + y; i < last; i += warps) {
    const float w = weight[i * fit.weight_stride];
    lowest = fminf(lowest, w);
    highest = fmaxf(highest, w);
  }
  shared.lowest[y][x] = lowest;
  shared.highest[y][x] = highest;
  __syncthreads();
  for (int other = 0; other < warps; ++other) {
    lowest = fminf(lowest, shared.lowest[other][x]);
    highest = fmaxf(highest, shared.highest[other][x]);
  }

  float least = INFINITY;
  int best = 0;
  // All warps take part in every round, with nothing to try in the last one perhaps.
  for (int round = 0; fit.candidates > 1 && round < fit.candidates; round += warps) {
    const int f = round + y;
    float scale, zero, error = 0.0f;
    span(fit, lowest, highest, fit.factors[f < fit.candidates ? f : 0], scale, zero);
    const float inverse = __frcp_rn(scale);
    for (int64_t start = first; start < last; start += kFitColumns) {
      const int columns = static_cast<int>(min(int64_t{kFitColumns}, last - start));
      __syncthreads();
#pragma unroll 8
      for (int i = y; i < columns; i += warps) {
        shared.weight[i][x] = weight[(start + i) * fit.weight_stride];
      }
      for (int i = y * kFitOutputs + x; i < columns; i += warps * kFitOutputs) {
        shared.importance[i] = fit.importance[start + i];
      }
      __syncthreads();
#pragma unroll 8
      for (int i = 0; i < columns; ++i) {
        const float w = shared.weight[i][x];
        const float code = fminf(fmaxf(round_to_even(w * inverse) + zero, 0.0f), maxq);
        const float missed = w - (code - zero) * scale;
        error += shared.importance[i] * (missed * missed);
      }
    }
    if (f < fit.candidates && error < least) {
      least = error;
      best = f;
    }
  }
  shared.error[y][x] = least;
  shared.factor[y][x] = best;
  __syncthreads();
  if (y != 0 || !inside) return;
  for (int other = 1; other < warps; ++other) {
    const float error = shared.error[other][x];
    const int f = shared.factor[other][x];
    if (error < least || (error == least && f < best)) {
      least = error;
      best = f;
    }
  }
  float scale, zero;
  span(fit, lowest, highest, fit.factors[best], scale, zero);
  fit.scales[group * fit.n + n] = scale;
  fit.zeros[group * fit.n + n] = zero;
}

// ---- columns -----------------------------------------------------------------------------------

constexpr int kThreads = 64;    // outputs per block, one per thread
constexpr int kColumns = 128;   // the longest run of columns
constexpr int kRegisters = 32;  // columns that a thread holds in registers at a time

struct ColumnsMemory {
  float factor[kColumns][kColumns];  // rows of the factor, upper triangular
  float weight[kColumns][kThreads];
};

// Each thread takes one output through all columns, kRegisters at a time: their own errors move on
// in registers, fully unrolled; the errors of all of them then go to the later columns in shared
// memory, four columns per read of the factor.
__global__ void __launch_bounds__(kThreads) solve_columns_kernel(Block block) {
  extern __shared__ float memory[];
  ColumnsMemory& shared = *reinterpret_cast<ColumnsMemory*>(memory);
  const int columns = static_cast<int>(block.columns);
  const int t = threadIdx.x;
  const int64_t n = blockIdx.x * int64_t{kThreads} + t;
  const bool inside = n < block.n;
  const int64_t at = inside ? n : 0;
  const float maxq = static_cast<float>(block.maxq);

  // Many loads in flight: one after another each would take its whole way to memory and back.
#pragma unroll 16
  for (int i = t; i < kColumns * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    const bool given = row < columns && column < columns;
    shared.factor[row][column] = given ? block.inverse[row * block.inverse_stride + column] : 0.0f;
  }
#pragma unroll 16
  for (int i = 0; i < kColumns; ++i) {
    shared.weight[i][t] = i < columns ? block.weight[i * block.weight_stride + at] : 0.0f;
  }
  __syncthreads();

  for (int first = 0; first < columns; first += kRegisters) {
    float w[kRegisters], error[kRegisters], scale[kRegisters], zero[kRegisters];
#pragma unroll
    for (int c = 0; c < kRegisters; ++c) {
      const int64_t group = first + c < columns ? block.group[first + c] : 0;
      scale[c] = block.scales[group * block.n + at];
      zero[c] = block.zeros[group * block.n + at];
      w[c] = shared.weight[first + c][t];
    }
#pragma unroll
    for (int c = 0; c < kRegisters; ++c) {
      const int i = first + c;
      error[c] = 0.0f;
      if (i < columns) {
        const float* row = shared.factor[i] + first;
        const float code = fminf(fmaxf(rintf(w[c] / scale[c]) + zero[c], 0.0f), maxq);
        error[c] = (w[c] - (code - zero[c]) * scale[c]) / row[c];
#pragma unroll
        for (int later = c + 1; later < kRegisters; ++later) {
          w[later] -= error[c] * row[later];
        }
        if (inside) {
          block.codes[i * block.n + n] = static_cast<uint8_t>(code);
          block.errors[i * block.n + n] = error[c];
          block.weight[i * block.weight_stride + n] = w[c];
        }
      }
    }
    for (int j = first + kRegisters; j < columns; j += 4) {
      float later[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        later[c] = shared.weight[j + c][t];
      }
#pragma unroll
      for (int c = 0; c < kRegisters; ++c) {
        const float4 share = *reinterpret_cast<const float4*>(&shared.factor[first + c][j]);
        later[0] -= error[c] * share.x;
        later[1] -= error[c] * share.y;
        later[2] -= error[c] * share.z;
        later[3] -= error[c] * share.w;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        shared.weight[j + c][t] = later[c];
      }
    }
  }
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_fit_grids(const Fit* fit, void* stream) {
  const int64_t groups = (fit->columns + fit->group_size - 1) / fit->group_size;
  if (groups == 0 || fit->n == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>((fit->n + kFitOutputs - 1) / kFitOutputs),
                  static_cast<unsigned>(groups));
  // As few warps without a factor to try as there can be.
  const int64_t rounds = (fit->candidates + kMostWarps - 1) / kMostWarps;
  const int64_t warps =
      fit->candidates > 1 ? (fit->candidates + rounds - 1) / rounds : int64_t{kMostWarps};
  fit_grids_kernel<<<grid, dim3(kFitOutputs, static_cast<unsigned>(warps)), 0,
                     static_cast<cudaStream_t>(stream)>>>(*fit);
  return outcome(cudaGetLastError());
}

const char* auto_gptq_cuda_solve_columns(const Block* block, void* stream) {
  if (block->columns == 0 || block->n == 0) return nullptr;
  if (block->columns > kColumns) return "more than 128 columns";
  const int bytes = sizeof(ColumnsMemory);
  const cudaError_t set = cudaFuncSetAttribute(
      solve_columns_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return outcome(set);
  const unsigned blocks = static_cast<unsigned>((block->n + kThreads - 1) / kThreads);
  solve_columns_kernel<<<blocks, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(*block);
  return outcome(cudaGetLastError());
}
