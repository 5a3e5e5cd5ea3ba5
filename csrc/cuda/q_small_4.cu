// The kernels for 4 bits: a file of their own, for compilers to work side by side.
#include "q_small_start.cuh"

namespace auto_gptq {

const char* start_small_4(const Product& product, SmallConfig config, cudaStream_t stream) {
  return product.type == kFloat16 ? start_small<4, __half>(product, config, stream)
                                  : start_small<4, __nv_bfloat16>(product, config, stream);
}

}  // namespace auto_gptq
