// Matrices as the copy engine of Hopper addresses them.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "../launch.h"

namespace auto_gptq {

// The driver's function, found once: this library is not linked to the driver, which may be absent.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return found;
}

// Boxes of `box_rows` rows and 64 columns of a matrix of 16-bit numbers, [rows, columns].  Returns null, or what went wrong.
inline const char* describe_matrix(CUtensorMap& map,
                                   const void* matrix,
                                   DataType type,
                                   int64_t rows,
                                   int64_t columns,
                                   uint32_t box_rows,
                                   CUtensorMapSwizzle swizzle) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) {
    return "The CUDA driver has no cuTensorMapEncodeTiled.";
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {64, box_rows}, steps[] = {1, 1};
  const CUresult result = encode(
      &map,
      type == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "The CUDA driver refused to describe a matrix.";
}

}  // namespace auto_gptq
