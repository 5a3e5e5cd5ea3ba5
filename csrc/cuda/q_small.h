// Between q_small.cu, which chooses, and the files that hold the kernels of one width each.
#pragma once

#include <cuda_runtime.h>

#include "../launch.h"

namespace auto_gptq {

// How the work is divided.
struct SmallConfig {
  int32_t row_tiles;  // 16 outputs each, of a block: 1, 2 or 4
  int32_t warps;      // of a block, an even number
  bool loads;         // x goes straight into registers, where K and the groups allow it
};

const char* start_small_2(const Product& product, SmallConfig config, cudaStream_t stream);
const char* start_small_3(const Product& product, SmallConfig config, cudaStream_t stream);
const char* start_small_4(const Product& product, SmallConfig config, cudaStream_t stream);
const char* start_small_8(const Product& product, SmallConfig config, cudaStream_t stream);

}  // namespace auto_gptq
