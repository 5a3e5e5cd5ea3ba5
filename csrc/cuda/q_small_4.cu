// The kernels of q_small.cuh for 4 bits: a file of their own, for compilers to work side by side.
#include "q_small.cuh"

const char* auto_gptq::start_small_4(const Product& product,
                                      SmallConfig config,
                                      cudaStream_t stream) {
  return start_small<4>(product, config, stream);
}
