// Between q_experts.cu, which chooses, and the files that hold the kernels of one width each.
#pragma once

#include <cuda_runtime.h>

#include "../experts.h"

namespace auto_gptq {

// Rows of an expert that a block takes: 8 and 16 by experts_few.cuh, 32 and 64 by experts_many.cuh.
const char* start_experts_2(const Experts& task, int rows, cudaStream_t stream);
const char* start_experts_3(const Experts& task, int rows, cudaStream_t stream);
const char* start_experts_4(const Experts& task, int rows, cudaStream_t stream);
const char* start_experts_8(const Experts& task, int rows, cudaStream_t stream);

}  // namespace auto_gptq
