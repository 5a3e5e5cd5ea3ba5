// How q_small is started: which of its instances serves a weight, and what it is told.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../launch.h"
#include "device.h"
#include "q_small.cuh"
#include "q_small.h"

namespace auto_gptq {

inline Small describe(const Product& product) {
  const Tiled& weight = product.weight;
  Small task{};
  task.tiles = weight.tiles;
  task.scales = weight.scales;
  task.zeros = weight.zeros;
  task.perm = weight.perm;
  task.x = product.x;
  task.bias = product.bias;
  task.y = product.y;
  task.m = static_cast<int32_t>(product.m);
  task.k = static_cast<int32_t>(weight.k);
  task.n = static_cast<int32_t>(weight.n);
  task.scale_stride = (task.n + kSide - 1) / kSide * kSide;
  task.k_tiles = (task.k + kSide - 1) / kSide;
  task.groups = static_cast<int32_t>(weight.groups);
  task.run = weight.run;
  task.scale_bytes = weight.scale_type == kFloat32 ? 4 : 2;
  task.scale_shift = weight.scale_type == kBFloat16 ? 16 : 0;
  task.scale_type = weight.scale_type;
  task.policy = kEvictFirst;
  return task;
}

inline void set_groups(Small& task, int64_t runs_of_group) {
  task.runs_of_group = static_cast<int32_t>(runs_of_group);
  task.group_of_run =
      static_cast<uint32_t>(((int64_t{1} << 32) + 2 * runs_of_group - 1) / (2 * runs_of_group));
}

// Start a kernel of so many blocks.  Shared memory that is not needed keeps blocks of the next kernel
// off processors until as many blocks of this one as are due to them have been there: on an H100 some
// products took 1.5 times as long without.
inline const char* launch_small(void (*kernel)(Small),
                                const Small& task,
                                int blocks,
                                int warps,
                                int bytes,
                                cudaStream_t stream) {
  constexpr int kOfProcessor = 228 * 1024, kReserved = 1024;  // on sm_90; the latter of each block
  const Device& device = current_device();
  if (device.sm == 90) {
    const int due = (blocks + device.processors - 1) / device.processors;
    bytes = std::max(bytes, kOfProcessor / (due + 1) - kReserved + 16);
  }
  return launch(kernel, task, blocks, 32 * warps, bytes, stream);
}

template <int BITS, typename T, int NT, int RW, int WN, int STAGES, Unit UNIT, Activations X>
const char* start_small_as(const Product& product, SmallConfig config, cudaStream_t stream) {
  int warps = config.warps;
  using Kernel = SmallKernel<BITS, T, NT, RW, WN, STAGES, UNIT, X>;
  Small task = describe(product);
  task.units = task.k_tiles / Kernel::kTiles;
  set_groups(task, product.weight.group_size / (UNIT == kPair ? 128 : task.run));
  const int stage = Kernel::stage_bytes(task.m, task.scale_bytes, task.zeros != nullptr);
  const int partial = RW * NT * 512;
  task.warp_bytes = std::max(STAGES * stage, partial);
  const int kept = X == kByPerm ? 2 * task.m * task.k : 0;
  const Device& device = current_device();
  while (warps > WN && warps * task.warp_bytes + kept > device.shared_bytes) {
    warps -= WN;
  }
  task.x_at = warps * task.warp_bytes;
  return launch_small(q_small<BITS, T, NT, RW, WN, STAGES, UNIT, X>, task,
                      task.scale_stride / (16 * RW * WN), warps, task.x_at + kept, stream);
}

// Instances are named by the outputs of a warp, the warps side by side, and the stages of the ring.
template <int BITS, typename T, Unit UNIT>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  // A lane copies one piece of the scales: too few for 64 outputs with 4 grids in fp32.
  constexpr int kMostTiles = UNIT == kSteps ? 2 : 4;
  // Of 64 outputs, and of 32 where the ring does not bring x: more are slower, but for small units.
  constexpr int kStages = BITS == 2 || UNIT == kTile ? 3 : 2;
  constexpr int kStagesOfRing = UNIT == kHalves ? 4 : kStages;
  constexpr int kStagesOf32 = BITS == 2 ? 4 : UNIT == kHalves ? 3 : 2;
  const bool wide = config.row_tiles == 4;
  if (product.weight.perm) {
    return start_small_as<BITS, T, 1, kMostTiles, 1, kStages, UNIT, kByPerm>(product, config, stream);
  }
  if constexpr (UNIT == kPair || UNIT == kHalves) {
    if (config.loads && product.weight.k % (UNIT == kPair ? 128 : 64) == 0) {
      if (product.m > 8) {
        return wide ? start_small_as<BITS, T, 2, 2, 2, 2, UNIT, kRegisters>(product, config, stream)
                    : start_small_as<BITS, T, 2, 2, 1, 2, UNIT, kRegisters>(product, config, stream);
      }
      return wide ? start_small_as<BITS, T, 1, 4, 1, kStages, UNIT, kRegisters>(product, config, stream)
                  : start_small_as<BITS, T, 1, 2, 1, kStagesOf32, UNIT, kRegisters>(product, config,
                                                                                    stream);
    }
  }
  if (product.m > 8) {
    config.warps = 8;
    return start_small_as<BITS, T, 2, 2, 1, 3, UNIT, kRing>(product, config, stream);
  }
  if (wide) {
    return start_small_as<BITS, T, 1, kMostTiles, 1, kStagesOfRing, UNIT, kRing>(product, config,
                                                                                 stream);
  }
  return config.row_tiles == 1
             ? start_small_as<BITS, T, 1, 1, 1, 4, UNIT, kRing>(product, config, stream)
             : start_small_as<BITS, T, 1, 2, 1, 4, UNIT, kRing>(product, config, stream);
}

template <int BITS, typename T>
const char* start_small(const Product& product, SmallConfig config, cudaStream_t stream) {
  const Tiled& weight = product.weight;
  if (weight.run == 16 || weight.scale_type == kFloat32) {
    return start_small<BITS, T, kSteps>(product, config, stream);
  }
  if (weight.run == 32) {
    return start_small<BITS, T, kHalves>(product, config, stream);
  }
  const bool paired = weight.group_size % 128 == 0 && (weight.k + kSide - 1) / kSide % 2 == 0;
  return paired ? start_small<BITS, T, kPair>(product, config, stream)
                : start_small<BITS, T, kTile>(product, config, stream);
}

}  // namespace auto_gptq
