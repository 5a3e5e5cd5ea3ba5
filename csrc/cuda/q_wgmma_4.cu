// The kernels for 4 bits: a file of their own, for compilers to work side by side.
#include "q_wgmma_start.cuh"

const char* auto_gptq::start_wgmma_4(const Deal& deal, int32_t layout, cudaStream_t stream) {
  return start_width<4>(deal, layout, stream);
}
