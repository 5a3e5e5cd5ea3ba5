// What every binding needs: checks that name what does not fit, and threads over columns.
//
// Only files called bindings* include torch, and only its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"

namespace auto_gptq_bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Codes a thread should get before it is worth waking.
constexpr int64_t kCodesPerThread = 1 << 16;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline std::optional<auto_gptq::DataType> data_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return auto_gptq::kFloat32;
    case ScalarType::Half:
      return auto_gptq::kFloat16;
    case ScalarType::BFloat16:
      return auto_gptq::kBFloat16;
    default:
      return std::nullopt;
  }
}

inline void check_floating(const char* name, ScalarType type) {
  STD_TORCH_CHECK(data_type(type), name, " is ", torch::headeronly::toString(type),
                  ", but must be Float, Half or BFloat16.");
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, but the other tensors are.");
}

inline void check_int32(const char* name, const Tensor& tensor) {
  check_cpu(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", but must be Int.");
}

inline void check_matrix(
    const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const char* meaning) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  " is ", shape_of(tensor), ", but must be ", meaning, " = [", rows, ", ", columns,
                  "].");
}

// What y = x W^T is like: [..., N], of M rows in all.
struct Rows {
  std::vector<int64_t> shape;
  int64_t m;
};

// Check x, [..., K], and the bias, [N], of a product with a weight [N, K]; not where they lie.
inline Rows check_operands(const Tensor& x, const std::optional<Tensor>& bias, int64_t k, int64_t n) {
  check_floating("x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x is ", shape_of(x),
                  ", but must be [..., K] with K = ", k, ".");
  if (bias) {
    check_floating("bias", bias->scalar_type());
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias is ", shape_of(*bias),
                    ", but must be [N] = [", n, "].");
  }
  Rows rows{{x.sizes().begin(), x.sizes().end()}, 1};
  rows.shape.back() = n;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    rows.m *= x.size(i);
  }
  return rows;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor as_float(const Tensor& tensor) {
  return as_contiguous(tensor.scalar_type() == ScalarType::Float
                           ? tensor
                           : torch::stable::to(tensor, ScalarType::Float));
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Call work(n_begin, n_end) in parallel for ranges that make up [begin, end), all multiples of 32.
template <typename Work>
void for_columns(int64_t begin, int64_t end, int64_t codes_per_column, const Work& work) {
  const int64_t per_block = std::max<int64_t>(32 * codes_per_column, 1);
  torch::stable::parallel_for(begin / 32, end / 32,
                              std::max<int64_t>(kCodesPerThread / per_block, 1),
                              [&](int64_t first, int64_t last) { work(32 * first, 32 * last); });
}

}  // namespace auto_gptq_bindings
