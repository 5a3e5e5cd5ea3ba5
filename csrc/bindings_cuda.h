// Call a launcher on the device and the current stream of a tensor.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"

#ifdef AUTO_GPTQ_CUDA
namespace auto_gptq_bindings {

// Found at run time, so that the library also loads beside a torch without CUDA.
inline void* current_stream(int32_t device) {
  using Find = int (*)(int32_t, void**);
  static const Find find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Find>(
        library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(find, "this torch has no CUDA.");
  void* stream = nullptr;
  STD_TORCH_CHECK(find(device, &stream) == 0, "there is no stream for device ", device, ".");
  return stream;
}

// launch(stream) returns null, or what went wrong.
template <typename Launch>
void run_on_gpu(const Tensor& like, const Launch& launch) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* failure = launch(current_stream(device));
  STD_TORCH_CHECK(!failure, "the kernel did not start: ", failure ? failure : "");
}

}  // namespace auto_gptq_bindings
#endif
