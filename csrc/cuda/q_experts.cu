// Products of experts: how many rows a block takes, and x brought into the order of the tiles.
#include "q_experts.h"

#include <algorithm>
#include <iterator>

#include "device.h"
#include "mma.cuh"

namespace auto_gptq {
namespace {

// The first row with at least so many rows of y per expert on average is taken.
struct Row {
  int64_t most_per_expert;
  int32_t rows;  // of a block
};

constexpr Row kTable[] = {{4, 8}, {12, 16}, {1 << 30, 64}};

ExpertsConfig choose(const Experts& task) {
  const auto fits = [&](const Row& row) { return task.m <= row.most_per_expert * task.experts; };
  const int32_t rows = std::find_if(std::begin(kTable), std::end(kTable), fits)->rows;
  // Blocks of 32 outputs, in multiples of what the processors hold at once.
  const int64_t parts = std::min(task.experts, task.m) + task.m / rows;
  const int64_t rounds = task.weight.n / 32 * parts / (2 * current_device().processors);
  if (rows > 16) {
    return {rows, rounds < 24 ? 4 : 8};
  }
  return {rows, rounds < 4 ? 1 : 4};
}

struct Gather {
  const uint16_t* x;  // [T, K]
  const int32_t* rows;
  const int32_t* offsets;
  const int32_t* perm;  // [E, K]
  uint16_t* sorted;     // out [S, K]
  int32_t k, experts;
};

// A thread brings 8 values together.
__global__ void __launch_bounds__(128) gather_rows(const __grid_constant__ Gather task) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int place = (blockIdx.y * blockDim.x + threadIdx.x) * 8, s = blockIdx.x;
  int begin = 0, end = task.experts;  // the expert lies in [begin, end]
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (task.offsets[middle + 1] <= s) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  if (place >= task.k || begin == task.experts) {  // nobody's rows are not read
    return;
  }
  const int32_t* perm = task.perm + static_cast<int64_t>(begin) * task.k + place;
  const uint16_t* x = task.x + static_cast<int64_t>(task.rows ? task.rows[s] : s) * task.k;
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int4 from = reinterpret_cast<const int4*>(perm)[i];
    v[2 * i] = x[from.x] | static_cast<uint32_t>(x[from.y]) << 16;
    v[2 * i + 1] = x[from.z] | static_cast<uint32_t>(x[from.w]) << 16;
  }
  *reinterpret_cast<uint4*>(task.sorted + static_cast<int64_t>(s) * task.k + place) =
      make_uint4(v[0], v[1], v[2], v[3]);
}

const char* gather(const Experts& task, cudaStream_t stream) {
  const auto k = static_cast<int32_t>(task.weight.k);
  const Gather made{static_cast<const uint16_t*>(task.x),
                    task.rows,
                    task.offsets,
                    task.weight.perm,
                    static_cast<uint16_t*>(task.workspace),
                    k,
                    static_cast<int32_t>(task.experts)};
  const dim3 blocks(static_cast<unsigned>(task.m), (k / 8 + 127) / 128);
  return launch(gather_rows, made, blocks, 128, 0, stream);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cuda_experts_bytes(const Experts* experts) {
  return experts->weight.perm ? 2 * experts->m * experts->weight.k : 0;
}

const char* auto_gptq_cuda_q_experts(const Experts* experts, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  Experts task = *experts;
  const ExpertsConfig config = choose(task);
  if (task.weight.perm) {
    const char* failure = gather(task, on);
    if (failure) {
      return failure;
    }
    task.x = task.workspace;
    task.rows = nullptr;
    task.weight.perm = nullptr;
  }
  switch (task.weight.bits) {
    case 2:
      return start_experts_2(task, config, on);
    case 3:
      return start_experts_3(task, config, on);
    case 4:
      return start_experts_4(task, config, on);
    default:
      return start_experts_8(task, config, on);
  }
}
