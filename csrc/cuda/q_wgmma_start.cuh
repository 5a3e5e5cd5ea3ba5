// Start the kernels of one width.
#pragma once

#include <algorithm>

#include "device.h"
#include "q_wgmma.cuh"

namespace auto_gptq {

template <typename C>
const char* start(const Deal& deal, cudaStream_t stream) {
  const char* failure = launch(q_wgmma<C>, deal, dim3(deal.blocks), C::kThreads, C::kBytes, stream,
                               std::max(deal.split, 1));
  if (failure || deal.split) {
    return failure;
  }
  const dim3 blocks(static_cast<unsigned>(deal.m_blocks * deal.n_blocks * (C::kEights / 2)));
  return launch(add_parts<typename C::Sum>, deal, blocks, C::kConsumers, 0, stream);
}

template <int BITS, typename T, Grids GRIDS, int SPANS>
const char* start_layout(const Deal& deal, int32_t layout, cudaStream_t stream) {
  switch (layout) {
    case 0:
      return start<Config<BITS, T, GRIDS, SPANS, Rows32>>(deal, stream);
    case 1:
      return start<Config<BITS, T, GRIDS, SPANS, Rows64>>(deal, stream);
    case 2:
      return start<Config<BITS, T, GRIDS, SPANS, Rows64Wide>>(deal, stream);
    case 3:
      return start<Config<BITS, T, GRIDS, SPANS, Rows128>>(deal, stream);
    default:
      return start<Config<BITS, T, GRIDS, SPANS, Rows128Wide>>(deal, stream);
  }
}

template <int BITS, typename T>
const char* start_grids(const Deal& deal, int32_t layout, cudaStream_t stream) {
  const Tiled& weight = deal.weight;
  const bool is_own = weight.scale_type == deal.type;
  if (weight.run == kSide && !is_own) {
    return start_layout<BITS, T, Grids::kAny, 1>(deal, layout, stream);
  }
  if (weight.run == kSide) {
    return weight.zeros ? start_layout<BITS, T, Grids::kZeros, 1>(deal, layout, stream)
                        : start_layout<BITS, T, Grids::kOwn, 1>(deal, layout, stream);
  }
  if (weight.run == 32 && is_own) {
    return weight.zeros ? start_layout<BITS, T, Grids::kZeros, 2>(deal, layout, stream)
                        : start_layout<BITS, T, Grids::kOwn, 2>(deal, layout, stream);
  }
  return start_layout<BITS, T, Grids::kAny, 4>(deal, layout, stream);
}

template <int BITS>
const char* start_width(const Deal& deal, int32_t layout, cudaStream_t stream) {
  return deal.type == kFloat16 ? start_grids<BITS, __half>(deal, layout, stream)
                               : start_grids<BITS, __nv_bfloat16>(deal, layout, stream);
}

}  // namespace auto_gptq
