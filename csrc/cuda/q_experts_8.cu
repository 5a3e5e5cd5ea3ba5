// The kernels for 8 bits: a file of their own, for compilers to work side by side.
#include "experts_start.cuh"

const char* auto_gptq::start_experts_8(const Experts& task,
                                       ExpertsConfig config,
                                       cudaStream_t stream) {
  return start_experts<8>(task, config, stream);
}
