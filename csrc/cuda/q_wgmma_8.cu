// The kernels for 8 bits: a file of their own, for compilers to work side by side.
#include "q_wgmma_start.cuh"

const char* auto_gptq::start_wgmma_8(const Deal& deal, int32_t layout, cudaStream_t stream) {
  return start_width<8>(deal, layout, stream);
}
