// What launchers ask of a GPU, and how they start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace auto_gptq {

struct Device {
  int32_t index;
  int32_t sm;            // compute capability, 80 for 8.0
  int32_t processors;    // multiprocessors
  int32_t shared_bytes;  // the most shared memory of a block
};

constexpr int kMostDevices = 64;

// Ask once per device; the runtime's answers take a microsecond each.
inline const Device& describe_device(int32_t index) {
  static std::array<std::atomic<const Device*>, kMostDevices> known{};
  std::atomic<const Device*>& slot = known[index % kMostDevices];
  const Device* found = slot.load(std::memory_order_acquire);
  if (found == nullptr || found->index != index) {
    const auto ask = [index](cudaDeviceAttr what) {
      int value = 0;
      cudaDeviceGetAttribute(&value, what, index);
      return value;
    };
    // Lives as long as the process; two threads that ask at once leave one too many.
    found = new Device{index,
                       10 * ask(cudaDevAttrComputeCapabilityMajor) +
                           ask(cudaDevAttrComputeCapabilityMinor),
                       ask(cudaDevAttrMultiProcessorCount),
                       ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    slot.store(found, std::memory_order_release);
  }
  return *found;
}

inline const Device& current_device() {
  int index = 0;
  cudaGetDevice(&index);
  return describe_device(index);
}

inline const char* outcome(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Start a kernel of one argument that may begin before the one in front of it has ended: it must
// call wait_for_previous_kernel() before it touches what others write or read.
template <typename Task>
const char* launch(void (*kernel)(Task),
                   const Task& task,
                   dim3 blocks,
                   int threads,
                   int shared_bytes,
                   cudaStream_t stream,
                   int cluster = 1) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      return cudaGetErrorString(error);
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = current_device().sm < 90 ? 0 : cluster > 1 ? 2 : 1;
  return outcome(cudaLaunchKernelEx(&config, kernel, task));
}

}  // namespace auto_gptq
