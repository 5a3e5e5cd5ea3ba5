// Products of some dozen to some hundred rows of x on Hopper: which layout of blocks takes which
// shape, and how many blocks run.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "arrange.h"
#include "device.h"
#include "q_matmul.h"
#include "q_wgmma.cuh"

namespace auto_gptq {
namespace {

// The layouts, and what a stage costs a block of each, measured on an H100.
using Rows32 = Layout<32, 4, 1, 2>;
using Rows64 = Layout<64, 4, 1, 2>;
using Rows128 = Layout<128, 2, 2, 2>;

struct Cost {
  int32_t rows, columns, depth;
  int64_t part;   // bytes
  int64_t stage;  // nanoseconds
};

template <typename L>
constexpr Cost cost(int64_t stage) {
  return {L::kRows, L::kColumns, L::kDepth, int64_t{L::kRows} * L::kColumns * 4, stage};
}

constexpr Cost kCosts[] = {cost<Rows32>(900), cost<Rows64>(1110), cost<Rows128>(1600)};
constexpr int64_t kStart = 4000;      // until a block's first product, and to store a result
constexpr int64_t kAdd = 1500;        // to start the kernel that adds parts up,
constexpr int64_t kBytesAtOnce = 18;  // and of a part for a nanosecond: all blocks write and read one

struct Choice {
  int32_t layout, blocks, whole;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t results_of(const Product& p, const Cost& cost) {
  return divide_up(p.m, cost.rows) * divide_up(p.weight.n, cost.columns);
}

int64_t stages_of(const Product& p, const Cost& cost) {
  return divide_up(p.weight.k, cost.depth * kSide);
}

Choice choose(const Product& p, int64_t processors) {
  Choice best = {};
  int64_t least = INT64_MAX;
  const auto consider = [&](int64_t time, const Choice& choice) {
    if (time < least) {
      least = time;
      best = choice;
    }
  };
  for (int32_t i = 0; i < static_cast<int32_t>(std::size(kCosts)); ++i) {
    const Cost& cost = kCosts[i];
    const int64_t results = results_of(p, cost), stages = stages_of(p, cost);
    consider(divide_up(results, processors) * (stages * cost.stage + kStart),
             {i, static_cast<int32_t>(std::min(results, processors)), 1});
    const int64_t blocks = std::min(processors, results * stages);
    consider(divide_up(results * stages, blocks) * cost.stage + kStart + kAdd +
                 cost.part / kBytesAtOnce,
             {i, static_cast<int32_t>(blocks), 0});
  }
  return best;
}

int64_t aligned(int64_t bytes) { return divide_up(bytes, 256) * 256; }

int64_t parts_bytes(const Product& p, const Choice& choice) {
  const Cost& cost = kCosts[choice.layout];
  return choice.whole ? 0 : (choice.blocks + results_of(p, cost) - 1) * cost.part;
}

Deal deal(const Product& p, const Choice& choice) {
  const Cost& cost = kCosts[choice.layout];
  Deal d{p};
  d.m_blocks = static_cast<int32_t>(divide_up(p.m, cost.rows));
  d.n_blocks = static_cast<int32_t>(divide_up(p.weight.n, cost.columns));
  d.k_tiles = static_cast<int32_t>(divide_up(p.weight.k, kSide));
  d.stages = static_cast<int32_t>(stages_of(p, cost));
  d.blocks = choice.blocks;
  const int32_t stages = d.m_blocks * d.n_blocks * d.stages;
  d.share = stages / d.blocks;
  d.longer = stages % d.blocks;
  d.all_rows = static_cast<int32_t>(arranged_rows(p.m));
  d.n_pad = static_cast<int32_t>(divide_up(p.weight.n, kSide) * kSide);
  d.whole = choice.whole;
  d.parts = reinterpret_cast<float4*>(static_cast<uint8_t*>(p.workspace) +
                                      aligned(arranged_bytes(p)));
  return d;
}

template <typename C>
const char* start(const Deal& deal, cudaStream_t stream) {
  const char* failure =
      launch(q_wgmma<C>, deal, dim3(deal.blocks), C::kThreads, C::kBytes, stream);
  if (failure || deal.whole) {
    return failure;
  }
  const dim3 blocks(static_cast<unsigned>(deal.m_blocks * deal.n_blocks * C::kEights));
  return launch(add_parts<C>, deal, blocks, C::kConsumers, 0, stream);
}

template <int BITS, typename T, Grids GRIDS>
const char* start_layout(const Deal& deal, int32_t layout, cudaStream_t stream) {
  switch (layout) {
    case 0:
      return start<Config<BITS, T, GRIDS, Rows32>>(deal, stream);
    case 1:
      return start<Config<BITS, T, GRIDS, Rows64>>(deal, stream);
    default:
      return start<Config<BITS, T, GRIDS, Rows128>>(deal, stream);
  }
}

template <int BITS, typename T>
const char* start_grids(const Deal& deal, int32_t layout, cudaStream_t stream) {
  if (deal.weight.run != kSide) {
    return start_layout<BITS, T, Grids::kSteps>(deal, layout, stream);
  }
  return deal.weight.scale_type == deal.type && !deal.weight.zeros
             ? start_layout<BITS, T, Grids::kOwn>(deal, layout, stream)
             : start_layout<BITS, T, Grids::kAny>(deal, layout, stream);
}

template <int BITS>
const char* start_type(const Deal& deal, int32_t layout, cudaStream_t stream) {
  return deal.type == kFloat16 ? start_grids<BITS, __half>(deal, layout, stream)
                               : start_grids<BITS, __nv_bfloat16>(deal, layout, stream);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cuda_q_wgmma_bytes(const Product* product) {
  const Choice choice = choose(*product, current_device().processors);
  return aligned(arranged_bytes(*product)) + parts_bytes(*product, choice);
}

const char* auto_gptq_cuda_q_wgmma(const Product* product, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const char* failure = arrange(*product, on);
  if (failure) {
    return failure;
  }
  const Choice choice = choose(*product, current_device().processors);
  const Deal dealt = deal(*product, choice);
  switch (product->weight.bits) {
    case 2:
      return start_type<2>(dealt, choice.layout, on);
    case 3:
      return start_type<3>(dealt, choice.layout, on);
    case 4:
      return start_type<4>(dealt, choice.layout, on);
    default:
      return start_type<8>(dealt, choice.layout, on);
  }
}
