// The kernels for y = x W^T over tiles, and which of them takes which product: a measured table.
#include <cuda_runtime.h>

#include "device.h"
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

constexpr int64_t kAnyM = 1 << 24;
constexpr int64_t kMostK = 1 << 20;  // what 32-bit arithmetic on groups allows

constexpr Row kTable[] = {
    {75, 999, 16, 0, auto_gptq_cuda_q_small, auto_gptq_cuda_sorted_x_bytes},
    {90, 90, 128, 0, auto_gptq_cuda_q_wgmma, auto_gptq_cuda_q_wgmma_bytes},
    {90, 90, kAnyM, 0, auto_gptq_cuda_q_wide, auto_gptq_cuda_q_wide_bytes},
    {80, 999, 64, 0, auto_gptq_cuda_q_mma, auto_gptq_cuda_q_mma_bytes},
};

// A workspace may depend on the device, which the launchers ask for as the current one.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    cudaGetDevice(&before_);
    if (before_ != device) {
      cudaSetDevice(device);
    }
    device_ = device;
  }
  ~OnDevice() {
    if (before_ != device_) {
      cudaSetDevice(before_);
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

}  // namespace

auto_gptq::Plan auto_gptq_cuda_plan(const Product* product, int32_t device) {
  const int32_t sm = auto_gptq::describe_device(device).sm;
  if (product->weight.k > kMostK || (product->type == auto_gptq::kBFloat16 && sm < 80)) {
    return {};
  }
  const OnDevice guard(device);
  for (const Row& row : kTable) {
    if (sm >= row.least_sm && sm <= row.most_sm && product->m <= row.most_m &&
        product->weight.k * product->weight.n >= row.least_weights) {
      return {row.launch, row.workspace ? row.workspace(product) : 0};
    }
  }
  return {};
}
