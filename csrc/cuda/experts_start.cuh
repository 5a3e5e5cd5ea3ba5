// The kernels of one width.
#pragma once

#include "experts_few.cuh"
#include "experts_many.cuh"
#include "q_experts.h"

namespace auto_gptq {

template <int BITS, typename T, int NT>
const char* start_few(const Experts& task, int side, cudaStream_t stream) {
  return side == 1 ? start_few<BITS, T, NT, 1>(task, stream)
                   : start_few<BITS, T, NT, 4>(task, stream);
}

template <int BITS, typename T>
const char* start_experts(const Experts& task, ExpertsConfig config, cudaStream_t stream) {
  switch (config.rows) {
    case 8:
      return start_few<BITS, T, 1>(task, config.side, stream);
    case 16:
      return start_few<BITS, T, 2>(task, config.side, stream);
    default:
      return config.side == 8 ? start_many<BITS, T, 1>(task, stream)
                              : start_many<BITS, T, 2>(task, stream);
  }
}

template <int BITS>
const char* start_experts(const Experts& task, ExpertsConfig config, cudaStream_t stream) {
  return task.type == kFloat16 ? start_experts<BITS, __half>(task, config, stream)
                               : start_experts<BITS, __nv_bfloat16>(task, config, stream);
}

}  // namespace auto_gptq
