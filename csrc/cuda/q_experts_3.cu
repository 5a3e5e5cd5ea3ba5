// The kernels for 3 bits: a file of their own, for compilers to work side by side.
#include "experts_start.cuh"

const char* auto_gptq::start_experts_3(const Experts& task,
                                       ExpertsConfig config,
                                       cudaStream_t stream) {
  return start_experts<3>(task, config, stream);
}
