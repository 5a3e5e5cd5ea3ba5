// The kernels for 2 bits: a file of their own, for compilers to work side by side.
#include "q_direct.cuh"

namespace auto_gptq {

template <typename T>
static const char* start(const Product& product, SmallConfig config, cudaStream_t stream) {
  return fits_direct(product) ? start_direct<2, T>(product, config, stream)
                              : start_small<2, T>(product, config, stream);
}

const char* start_small_2(const Product& product, SmallConfig config, cudaStream_t stream) {
  return product.type == kFloat16 ? start<__half>(product, config, stream)
                                  : start<__nv_bfloat16>(product, config, stream);
}

}  // namespace auto_gptq
