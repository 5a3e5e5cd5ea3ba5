// The kernels of one width.
#pragma once

#include "experts_few.cuh"
#include "experts_many.cuh"
#include "q_experts.h"

namespace auto_gptq {

template <int BITS, typename T>
const char* start_experts(const Experts& task, int rows, cudaStream_t stream) {
  switch (rows) {
    case 8:
      return start_few<BITS, T, 1>(task, stream);
    case 16:
      return start_few<BITS, T, 2>(task, stream);
    case 32:
      return start_many<BITS, T, 32, 2>(task, stream);
    default:
      return start_many<BITS, T, 64, 1>(task, stream);
  }
}

template <int BITS>
const char* start_experts(const Experts& task, int rows, cudaStream_t stream) {
  return task.type == kFloat16 ? start_experts<BITS, __half>(task, rows, stream)
                               : start_experts<BITS, __nv_bfloat16>(task, rows, stream);
}

}  // namespace auto_gptq
