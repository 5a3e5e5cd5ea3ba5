// Between q_experts.cu, which chooses, and the files that hold the kernels of one width each.
#pragma once

#include <cuda_runtime.h>

#include "../experts.h"

namespace auto_gptq {

// How the work is divided.
struct ExpertsConfig {
  int32_t rows;  // of an expert that a block takes: 8 or 16 by experts_few.cuh, 64 by
                 // experts_many.cuh
  int32_t side;  // warps of a block side by side, 32 outputs each; the others share out the inputs
};

const char* start_experts_2(const Experts& task, ExpertsConfig config, cudaStream_t stream);
const char* start_experts_3(const Experts& task, ExpertsConfig config, cudaStream_t stream);
const char* start_experts_4(const Experts& task, ExpertsConfig config, cudaStream_t stream);
const char* start_experts_8(const Experts& task, ExpertsConfig config, cudaStream_t stream);

}  // namespace auto_gptq
