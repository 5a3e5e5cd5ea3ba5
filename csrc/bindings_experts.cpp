// torch.ops.auto_gptq.q_experts, sort_by_expert and combine_experts on NVIDIA GPUs.
#include "bindings_experts.h"

#include <tuple>

#include "bindings_cuda.h"
#include "experts.h"

#ifdef AUTO_GPTQ_CUDA
namespace {

using namespace auto_gptq_bindings;

Tensor q_experts_cuda(const Tensor& x,
                      const std::optional<Tensor>& rows,
                      const Tensor& offsets,
                      const Tensor& tiles,
                      const Tensor& scales,
                      const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& perm,
                      const std::optional<Tensor>& bias,
                      int64_t bits,
                      int64_t group_size,
                      int64_t k,
                      int64_t n,
                      bool) {
  const StackedWeight weight = check_experts(x, rows, offsets, tiles, scales, zeros, perm, bias,
                                             bits, group_size, k, n);
  const auto type = *data_type(x.scalar_type());
  STD_TORCH_CHECK(type != auto_gptq::kFloat32,
                  "x is Float, but on a GPU experts multiply Half or BFloat16.");
  const Tensor own = as_vectors(x), ends = as_contiguous(offsets);
  const std::optional<Tensor> from = rows ? std::optional(as_contiguous(*rows)) : rows;
  const std::optional<Tensor> addend =
      weight.bias && weight.bias->scalar_type() != x.scalar_type()
          ? std::optional(torch::stable::to(*weight.bias, x.scalar_type()))
          : weight.bias;
  const int64_t m = rows ? rows->size(0) : x.size(0);
  STD_TORCH_CHECK(m < (1 << 30) && k <= (1 << 20), "there are ", m, " rows of ", k,
                  " inputs, but at most 2^30 of 2^20 can be.");
  Tensor y = torch::stable::new_empty(own, {m, n});
  if (y.numel() == 0 || k == 0) {
    return k == 0 ? torch::stable::zero_(y) : y;
  }
  auto_gptq::Experts task{weight.first.tiled,
                          tiles.size(0),
                          own.const_data_ptr(),
                          from ? static_cast<const int32_t*>(from->const_data_ptr()) : nullptr,
                          static_cast<const int32_t*>(ends.const_data_ptr()),
                          addend ? addend->const_data_ptr() : nullptr,
                          y.mutable_data_ptr(),
                          nullptr,
                          m,
                          type};
  const int64_t bytes = auto_gptq_cuda_experts_bytes(&task);
  Tensor workspace = torch::stable::new_empty(own, {bytes}, ScalarType::Byte);
  task.workspace = workspace.mutable_data_ptr();
  run_on_gpu(x, [&](void* stream) { return auto_gptq_cuda_q_experts(&task, stream); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& index, int64_t experts) {
  check_index(index, experts);
  const Tensor numbers = as_contiguous(index.scalar_type() == ScalarType::Long
                                           ? index
                                           : torch::stable::to(index, ScalarType::Long));
  const int64_t size = index.numel();
  Tensor rows = torch::stable::new_empty(index, {size}, ScalarType::Int);
  Tensor places = torch::stable::new_empty(index, {size}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(index, {experts + 1}, ScalarType::Int);
  const auto_gptq::Sort task{static_cast<const int64_t*>(numbers.const_data_ptr()),
                             static_cast<int32_t*>(rows.mutable_data_ptr()),
                             static_cast<int32_t*>(places.mutable_data_ptr()),
                             static_cast<int32_t*>(offsets.mutable_data_ptr()),
                             size,
                             experts,
                             index.size(1)};
  run_on_gpu(index, [&](void* stream) { return auto_gptq_cuda_sort(&task, stream); });
  return {rows, places, offsets};
}

Tensor combine_experts(const Tensor& y, const Tensor& places, const Tensor& weights) {
  check_combine(y, places, weights);
  const int64_t tokens = weights.size(0), top_k = weights.size(1);
  const Tensor own = as_vectors(y), from = as_contiguous(places), shares = as_contiguous(weights);
  Tensor out = torch::stable::new_empty(own, {tokens, y.size(1)});
  if (out.numel() > 0) {
    const auto_gptq::Combine task{own.const_data_ptr(),
                                  static_cast<const int32_t*>(from.const_data_ptr()),
                                  shares.const_data_ptr(),
                                  out.mutable_data_ptr(),
                                  tokens,
                                  top_k,
                                  y.size(1),
                                  *data_type(y.scalar_type()),
                                  *data_type(weights.scalar_type())};
    run_on_gpu(y, [&](void* stream) { return auto_gptq_cuda_combine(&task, stream); });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CUDA, m) {
  m.impl("q_experts", TORCH_BOX(&q_experts_cuda));
  m.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  m.impl("combine_experts", TORCH_BOX(&combine_experts));
}
#endif
