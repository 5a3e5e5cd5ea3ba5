// The kernels for 3 bits: a file of their own, for compilers to work side by side.
#include "q_small_start.cuh"

namespace auto_gptq {

const char* start_small_3(const Product& product, SmallConfig config, cudaStream_t stream) {
  return product.type == kFloat16 ? start_small<3, __half>(product, config, stream)
                                  : start_small<3, __nv_bfloat16>(product, config, stream);
}

}  // namespace auto_gptq
