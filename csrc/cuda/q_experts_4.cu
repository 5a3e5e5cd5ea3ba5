// The kernels for 4 bits: a file of their own, for compilers to work side by side.
#include "experts_start.cuh"

const char* auto_gptq::start_experts_4(const Experts& task,
                                       ExpertsConfig config,
                                       cudaStream_t stream) {
  return start_experts<4>(task, config, stream);
}
