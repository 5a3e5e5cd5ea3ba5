// The kernels of q_small.cuh for 8 bits: a file of their own, for compilers to work side by side.
#include "q_small.cuh"

const char* auto_gptq::start_small_8(const Product& product,
                                      SmallConfig config,
                                      cudaStream_t stream) {
  return start_small<8>(product, config, stream);
}
