// x as the tensor cores take it beside a weight in tiles.
#include "arrange.h"

#include "device.h"
#include "mma.cuh"
#include "q_matmul.h"
#include "tiles.cuh"

namespace auto_gptq {
namespace {

constexpr int kThreads = 256;

// A thread writes eight inputs of a row: of one step, of four lanes, their i = 0, 1 or i = 2, 3.
__global__ void __launch_bounds__(kThreads) arrange_x(const __grid_constant__ Product p) {
  let_next_kernel_start();
  const int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t rows = arranged_rows(p.m), row = id / 8 % rows, tile = id / 8 / rows;
  const int chunk = static_cast<int>(id % 8);
  if (tile * kSide >= (p.weight.k + 127) / 128 * 128) {
    return;
  }
  wait_for_previous_kernel();
  uint32_t pair[4] = {0, 0, 0, 0};
  if (row < p.m) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.weight.k;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t at = tile * kSide + place_of(chunk / 2, q, p.weight.run) + chunk % 2 * 2;
      if (at < p.weight.k) {
        if (p.weight.perm) {
          const int2 from = *reinterpret_cast<const int2*>(p.weight.perm + at);
          pair[q] = x[from.x] | static_cast<uint32_t>(x[from.y]) << 16;
        } else {
          pair[q] = *reinterpret_cast<const uint32_t*>(x + at);
        }
      }
    }
  }
  static_cast<uint4*>(p.workspace)[(tile * rows + row) * 8 + (chunk ^ static_cast<int>(row % 8))] =
      make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

}  // namespace

const char* arrange(const Product& product, cudaStream_t stream) {
  const int64_t vectors = arranged_bytes(product) / 16;
  const dim3 blocks(static_cast<unsigned>((vectors + kThreads - 1) / kThreads));
  return launch(arrange_x, product, blocks, kThreads, 0, stream);
}

}  // namespace auto_gptq
