// The kernels for 2 bits: a file of their own, for compilers to work side by side.
#include "q_wgmma_start.cuh"

const char* auto_gptq::start_wgmma_2(const Deal& deal, int32_t layout, cudaStream_t stream) {
  return start_width<2>(deal, layout, stream);
}
