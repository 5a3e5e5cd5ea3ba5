// Products of hundreds of rows of x on Hopper: what is computed where, and how it is started.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <random>

#include "arrange.h"
#include "device.h"
#include "q_matmul.h"
#include "q_wide.cuh"
#include "tensor_map.h"

namespace auto_gptq {
namespace {

using namespace wide;

Work work_of(const Product& p) {
  return choose(p.m, p.weight.n, p.weight.k, current_device().processors);
}

// What lies in the workspace, in this order: with act-order x with its inputs in the order of their
// groups, and what blocks give each other.
struct Workspace {
  int64_t sorted, flags, sums;  // bytes

  Workspace(const Product& p, const Work& work) {
    const auto whole = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const int64_t givers = work.more ? 2 * work.pairs : 0;
    flags = whole(givers * sizeof(uint64_t));
    sums = givers * work.rows * work.columns * sizeof(float);
    sorted = p.weight.perm ? whole(2 * p.m * p.weight.k) : 0;
  }
};

// Different for each launch, and like no number that anything else writes: splitmix64.
uint64_t next_number() {
  static std::atomic<uint64_t> count{std::random_device{}() * 0x100000001ull};
  uint64_t z = count.fetch_add(0x9e3779b97f4a7c15ull, std::memory_order_relaxed);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

template <int BITS, typename T, int SPANS, bool PLAIN, int ROWS, int GROUPS>
const char* start(Task& task, cudaStream_t stream) {
  using B = wide::Block<BITS, T, SPANS, PLAIN, ROWS, GROUPS>;
  Product& p = task.p;
  const Workspace space(p, task.work);
  auto* const workspace = static_cast<uint8_t*>(p.workspace);
  task.flags = reinterpret_cast<uint64_t*>(workspace + space.sorted);
  task.sums = workspace + space.sorted + space.flags;
  task.number = next_number();
  if (p.weight.perm) {
    if (const char* failure = sort_rows(p, workspace, stream)) {
      return failure;
    }
    p.x = workspace;
    p.weight.perm = nullptr;
  }
  const char* failure =
      describe_matrix(task.x, p.x, p.type, p.m, p.weight.k, ROWS / 2, CU_TENSOR_MAP_SWIZZLE_128B);
  if (!failure) {
    failure =
        describe_matrix(task.y, p.y, p.type, p.m, p.weight.n, ROWS / 4, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (!failure) {  // lines of 128 bytes
    constexpr int kLines = B::kTile / 128;
    const int64_t tiles = (p.weight.n + kSide - 1) / kSide * task.work.stages;
    failure = describe_matrix(task.tiles, p.weight.tiles, p.type, tiles * kLines, kSide, kLines,
                              B::Lane::kSwizzle);
  }
  return failure ? failure
                 : launch(q_wide<BITS, T, SPANS, PLAIN, ROWS, GROUPS>, task,
                          dim3(2 * task.work.pairs), B::kThreads, B::kBytes, stream);
}

template <int BITS, typename T, int SPANS, bool PLAIN>
const char* start_shape(Task& task, cudaStream_t stream) {
  if (task.work.columns == 192) {
    return start<BITS, T, SPANS, PLAIN, 128, 3>(task, stream);
  }
  switch (task.work.rows) {
    case 128:
      return start<BITS, T, SPANS, PLAIN, 128, 2>(task, stream);
    case 192:
      return start<BITS, T, SPANS, PLAIN, 192, 2>(task, stream);
    default:
      return start<BITS, T, SPANS, PLAIN, 256, 2>(task, stream);
  }
}

template <int BITS, typename T>
const char* start_spans(Task& task, cudaStream_t stream) {
  const Tiled& weight = task.p.weight;
  const bool plain = !weight.zeros && weight.scale_type == task.p.type;
  switch (kSide / weight.run) {
    case 1:
      return plain ? start_shape<BITS, T, 1, true>(task, stream)
                   : start_shape<BITS, T, 1, false>(task, stream);
    case 2:
      return plain && BITS == 4 ? start_shape<BITS, T, 2, BITS == 4>(task, stream)
                                : start_shape<BITS, T, 2, false>(task, stream);
    default:
      return start_shape<BITS, T, 4, false>(task, stream);
  }
}

template <int BITS>
const char* start_type(Task& task, cudaStream_t stream) {
  return task.p.type == kFloat16 ? start_spans<BITS, __half>(task, stream)
                                 : start_spans<BITS, __nv_bfloat16>(task, stream);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

int64_t auto_gptq_cuda_q_wide_bytes(const Product* product) {
  const Workspace space(*product, work_of(*product));
  return space.sorted + space.flags + space.sums;
}

const char* auto_gptq_cuda_q_wide(const Product* product, void* stream) {
  Task task{*product, work_of(*product)};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (product->weight.bits) {
    case 2:
      return start_type<2>(task, on);
    case 3:
      return start_type<3>(task, on);
    case 4:
      return start_type<4>(task, on);
    default:
      return start_type<8>(task, on);
  }
}
