// The kernels for y = x W^T over tiles, and which of them takes which product: a measured table.
#include <cuda_runtime.h>

#include <array>

#include "q_matmul.h"

namespace {

using auto_gptq::Product;

// The first row that a product fits is taken; where none does, cuBLAS gets the dense weight.
struct Row {
  int32_t least_sm, most_sm;  // compute capability, 80 for 8.0
  int64_t most_m;             // rows of x
  int64_t least_weights;      // K N
  const char* (*launch)(const Product*, void* stream);
  int64_t (*workspace)(const Product*);  // null: none
};

constexpr std::array<Row, 0> kTable{};

int32_t capability(int32_t device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

}  // namespace

auto_gptq::Plan auto_gptq_cuda_plan(const Product* product, int32_t device) {
  const int32_t sm = capability(device);
  for (const Row& row : kTable) {
    if (sm >= row.least_sm && sm <= row.most_sm && product->m <= row.most_m &&
        product->weight.k * product->weight.n >= row.least_weights) {
      return {row.launch, row.workspace ? row.workspace(product) : 0};
    }
  }
  return {};
}
