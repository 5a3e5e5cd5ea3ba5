// How a binding launches a kernel on a GPU: on the tensor's device, on torch's current stream.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"

namespace auto_gptq_bindings {

#ifdef AUTO_GPTQ_CUDA
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

template <typename Task>
void run_on_gpu(const Tensor& like, const char* (*launch)(const Task*, void*), const Task& task) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* failure = launch(&task, current_stream(device));
  STD_TORCH_CHECK(!failure, "the kernel did not start: ", failure ? failure : "");
}
#endif

}  // namespace auto_gptq_bindings
