// The kernels of q_small.cuh for 3 bits: a file of their own, for compilers to work side by side.
#include "q_small.cuh"

const char* auto_gptq::start_small_3(const Product& product,
                                      SmallConfig config,
                                      cudaStream_t stream) {
  return start_small<3>(product, config, stream);
}
