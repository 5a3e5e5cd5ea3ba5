// x in the order that inputs have in the tiles of a weight.
//
// [K' / 64, M', 128 bytes], K' being K rounded up to 128 and M' M rounded up to 8: rows of 64
// inputs, zeros behind the last, the inputs of each step in the order of the columns of
// mma.m16n8k16, and the eight vectors of 16 bytes of row r swapped: vector v lies at v ^ (r % 8),
// which is the 128 byte swizzle of wgmma.  So any rows from a multiple of 8 on are one piece of
// memory, ready to be multiplied.
#pragma once

#include <cuda_runtime.h>

#include "../launch.h"

namespace auto_gptq {

__host__ __device__ inline int64_t arranged_rows(int64_t m) { return (m + 7) / 8 * 8; }

inline int64_t arranged_bytes(const Product& product) {
  return (product.weight.k + 127) / 128 * 2 * arranged_rows(product.m) * 128;
}

// Arrange x at the beginning of the workspace; the next kernel may start before this has ended.
const char* arrange(const Product& product, cudaStream_t stream);

// Write x with its inputs in the order of perm, [M, K] and otherwise as it is (sort_rows.cu).
const char* sort_rows(const Product& product, void* to, cudaStream_t stream);

}  // namespace auto_gptq
