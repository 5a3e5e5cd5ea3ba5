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
  return choose(p.m, p.weight.n, p.weight.k, p.weight.bits, current_device().processors);
}

// What lies in the workspace, in this order: x as the kernel reads it (with act-order its inputs are
// sorted first, and then it may be arranged), and what blocks give each other.
struct Workspace {
  int64_t arranged, sorted, flags, sums;  // bytes

  Workspace(const Product& p, const Work& work) {
    const auto whole = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const int64_t givers = work.more ? 2 * work.pairs : 0;
    flags = whole(givers * sizeof(uint64_t));
    sums = givers * work.rows * work.columns * sizeof(float);
    arranged = takes_own_order(p.weight.bits, kSide / p.weight.run)
                   ? 0
                   : whole(arranged_bytes(p));
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

const char* read_x(Task& task, const Workspace& space, int box_rows, cudaStream_t stream) {
  Product& p = task.p;
  if (space.sorted) {
    void* sorted = static_cast<uint8_t*>(p.workspace) + space.arranged;
    if (const char* failure = sort_rows(p, sorted, stream)) {
      return failure;
    }
    p.x = sorted;
    p.weight.perm = nullptr;
  }
  if (space.arranged == 0) {
    task.x_columns = kSide;
    task.x_rows = 0;
    return describe_matrix(task.x, p.x, p.type, p.m, p.weight.k, box_rows,
                           CU_TENSOR_MAP_SWIZZLE_128B);
  }
  task.x_columns = 0;
  task.x_rows = static_cast<int>(arranged_rows(p.m));
  const char* failure = arrange(p, stream);
  return failure ? failure
                 : describe_matrix(task.x, p.workspace, p.type, arranged_bytes(p) / 128, kSide,
                                   box_rows, CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <int BITS, typename T, int SPANS, bool PLAIN, int ROWS, int GROUPS>
const char* start(Task& task, cudaStream_t stream) {
  using B = wide::Block<BITS, T, SPANS, PLAIN, ROWS, GROUPS>;
  const Workspace space(task.p, task.work);
  auto* const free = static_cast<uint8_t*>(task.p.workspace) + space.arranged + space.sorted;
  task.flags = reinterpret_cast<uint64_t*>(free);
  task.sums = free + space.flags;
  task.number = next_number();
  const char* failure = read_x(task, space, ROWS / 2, stream);
  if (!failure) {
    failure = describe_matrix(task.y, task.p.y, task.p.type, task.p.m, task.p.weight.n, ROWS / 2,
                              CU_TENSOR_MAP_SWIZZLE_128B);
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
  const int spans = kSide / weight.run;
  if constexpr (BITS == 4) {
    if (spans == 2) {
      return start_shape<BITS, T, 2, false>(task, stream);
    }
    if (spans == 1 && !weight.zeros && weight.scale_type == task.p.type) {
      return start_shape<BITS, T, 1, true>(task, stream);
    }
  }
  return spans == 1 ? start_shape<BITS, T, 1, false>(task, stream)
                    : start_shape<BITS, T, 4, false>(task, stream);
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
  return space.arranged + space.sorted + space.flags + space.sums;
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
