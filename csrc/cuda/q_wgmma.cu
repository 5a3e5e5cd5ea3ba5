// Products of some dozen to some hundred rows of x on Hopper: which layout of blocks takes which
// shape, and how many blocks run.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "arrange.h"
#include "device.h"
#include "q_matmul.h"
#include "q_wgmma.h"
#include "tensor_map.h"

namespace auto_gptq {
namespace {

// A layout, and what the products of a stage cost a block, measured on an H100.
struct Cost {
  int32_t rows, columns, depth;
  int64_t part;   // bytes
  int64_t stage;  // nanoseconds
};

template <typename L>
constexpr Cost cost(int64_t stage) {
  return {L::kRows, L::kColumns, L::kDepth, int64_t{L::kRows} * L::kColumns * 4, stage};
}

constexpr Cost kCosts[] = {cost<Rows32>(620), cost<Rows64>(780), cost<Rows64Wide>(960),
                           cost<Rows128>(830), cost<Rows128Wide>(1590)};
constexpr int64_t kMemory = 2750;  // bytes of weights that come in a nanosecond
// How many clusters of so many blocks run at once.
constexpr int64_t kClusters[] = {0, 132, 66, 39, 30, 22, 17, 15, 15};
constexpr int64_t kStart = 3200;      // until a block's first product, and to store a result
constexpr int64_t kMeet = 400;        // for blocks of a cluster to wait for each other,
constexpr int64_t kRemoteBytes = 18;  // and to send so many bytes for a nanosecond
constexpr int64_t kAdd = 3500;        // to start the kernel that adds parts up,
constexpr int64_t kBytesAtOnce = 18;  // and of a part for a nanosecond, while all blocks have one

struct Choice {
  int32_t layout, blocks, split;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t results_of(const Product& p, const Cost& cost) {
  return divide_up(p.m, cost.rows) * divide_up(p.weight.n, cost.columns);
}

int64_t stages_of(const Product& p, const Cost& cost) {
  return divide_up(p.weight.k, cost.depth * kSide);
}

// What a stage costs each of so many blocks, which may wait for weights.  Blocks with other rows of
// x share them.
int64_t stage_time(const Product& p, const Cost& cost, int64_t blocks) {
  const int64_t sharing = std::min<int64_t>(divide_up(p.m, cost.rows), 8);
  const int64_t bytes = int64_t{cost.columns} * cost.depth * kSide * p.weight.bits / 8;
  return std::max(cost.stage, blocks * bytes / sharing / kMemory);
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
    const int64_t at_once = std::min(results, processors);
    consider(divide_up(results, processors) * (stages * stage_time(p, cost, at_once) + kStart),
             {i, static_cast<int32_t>(at_once), 1});
    for (int32_t split = 2; split < static_cast<int32_t>(std::size(kClusters)); ++split) {
      if (results <= kClusters[split] && results * split <= processors && stages >= split) {
        const int64_t moved = cost.part / split * (split - 1);
        consider(divide_up(stages, split) * stage_time(p, cost, results * split) + kStart + kMeet +
                     moved / kRemoteBytes,
                 {i, static_cast<int32_t>(results * split), split});
      }
    }
    const int64_t blocks = std::min(processors, results * stages);
    consider(divide_up(results * stages, blocks) * stage_time(p, cost, blocks) + kStart + kAdd +
                 cost.part / kBytesAtOnce,
             {i, static_cast<int32_t>(blocks), 0});
  }
  return best;
}

int64_t sorted_bytes(const Product& p) {
  return divide_up(p.weight.perm ? 2 * p.m * p.weight.k : 0, 256) * 256;
}

int64_t parts_bytes(const Product& p, const Choice& choice) {
  const Cost& cost = kCosts[choice.layout];
  return choice.split ? 0 : (choice.blocks + results_of(p, cost) - 1) * cost.part;
}

// Who computes what; x not yet described.
Deal deal(const Product& p, const Choice& choice) {
  const Cost& cost = kCosts[choice.layout];
  Deal d{p};
  d.m_blocks = static_cast<int32_t>(divide_up(p.m, cost.rows));
  d.n_blocks = static_cast<int32_t>(divide_up(p.weight.n, cost.columns));
  d.k_tiles = static_cast<int32_t>(divide_up(p.weight.k, kSide));
  d.stages = static_cast<int32_t>(stages_of(p, cost));
  d.blocks = choice.blocks;
  d.split = choice.split;
  const int32_t stages = d.m_blocks * d.n_blocks * d.stages;
  d.share = stages / d.blocks;
  d.longer = stages % d.blocks;
  d.n_pad = static_cast<int32_t>(divide_up(p.weight.n, kSide) * kSide);
  d.parts = reinterpret_cast<float4*>(static_cast<uint8_t*>(p.workspace) + sorted_bytes(p));
  return d;
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cuda_q_wgmma_bytes(const Product* product) {
  return sorted_bytes(*product) +
         parts_bytes(*product, choose(*product, current_device().processors));
}

const char* auto_gptq_cuda_q_wgmma(const Product* given, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  Product product = *given;
  if (product.weight.perm) {
    if (const char* failure = sort_rows(*given, given->workspace, on)) {
      return failure;
    }
    product.x = product.workspace;
    product.weight.perm = nullptr;
  }
  const Choice choice = choose(product, current_device().processors);
  Deal dealt = deal(*given, choice);  // parts lie behind sorted x
  dealt.x = product.x;
  // Rows that are not there would take as long to come as others.
  const int64_t rows = std::min<int64_t>(product.m, kCosts[choice.layout].rows);
  const char* failure = describe_matrix(dealt.rows, product.x, product.type, product.m,
                                        product.weight.k, static_cast<uint32_t>(rows),
                                        CU_TENSOR_MAP_SWIZZLE_128B);
  if (failure) {
    return failure;
  }
  switch (product.weight.bits) {
    case 2:
      return start_wgmma_2(dealt, choice.layout, on);
    case 3:
      return start_wgmma_3(dealt, choice.layout, on);
    case 4:
      return start_wgmma_4(dealt, choice.layout, on);
    default:
      return start_wgmma_8(dealt, choice.layout, on);
  }
}
