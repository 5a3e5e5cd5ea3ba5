// torch.ops.auto_gptq.q_matmul and q_matmul_int8 on the CPU.
#include <array>
#include <vector>

#include "bindings_tiles.h"

namespace {

using namespace auto_gptq_bindings;

// Up to this many rows a row of x at a time goes through the codes as they lie; more rows are worth
// unfolding them.
constexpr int64_t kFewRows = 4;

// Rounded x, and the memory that it lies in.
struct Activations {
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;
  auto_gptq::Rounded rounded;
};

Activations round_rows(const auto_gptq::Tiled& weight, const Tensor& x, bool to_bytes) {
  const auto isa = auto_gptq_cpu_best_isa();
  const int64_t m = x.size(0), tiles = padded(weight.k) / kTile;
  const int32_t few = m <= kFewRows && isa != auto_gptq::kPortable;
  const int32_t terms = to_bytes && !few ? 1 : 2;
  const int64_t bytes = terms * auto_gptq_cpu_bytes_of_x(weight.bits, few);
  Activations made{std::vector<int8_t>(m * tiles * bytes), std::vector<float>(m * tiles * 2),
                   std::vector<float>(m * tiles * 2), {}};
  const int32_t unit = weight.bits != 8 && weight.group_size % (2 * kTile) == 0 ? 2 : 1;
  made.rounded = {m, terms, few, unit, made.codes.data(), made.scales.data(), made.sums.data()};
  const auto* data = static_cast<const float*>(x.const_data_ptr());
  torch::stable::parallel_for(
      0, m, std::max<int64_t>(kCodesPerThread / std::max<int64_t>(weight.k, 1), 1),
      [&](int64_t begin, int64_t end) {
        auto_gptq_cpu_round(&weight, data, &made.rounded, begin, end, isa);
      });
  return made;
}

// Runs of 16 are in no kernel.
Tensor multiply_dense(const Tensor& x,
                      const TiledWeight& weight,
                      const std::optional<Tensor>& bias,
                      int64_t group_size) {
  const auto& [tiles, scales, zeros, perm, tiled] = weight;
  std::array<StableIValue, 9> stack{
      torch::stable::detail::from(tiles),
      torch::stable::detail::from(scales),
      torch::stable::detail::from(zeros),
      torch::stable::detail::from(perm),
      torch::stable::detail::from(static_cast<int64_t>(tiled.bits)),
      torch::stable::detail::from(group_size),
      torch::stable::detail::from(tiled.k),
      torch::stable::detail::from(tiled.n),
      torch::stable::detail::from(x.scalar_type()),
  };
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("auto_gptq::dequantize_tiles", "", stack.data(),
                                               TORCH_ABI_VERSION));
  return linear(x, torch::stable::detail::to<Tensor>(stack[0]),
                bias ? std::optional(torch::stable::to(*bias, x.scalar_type())) : bias);
}

Tensor multiply(const Tensor& x,
                const Tensor& tiles,
                const Tensor& scales,
                const std::optional<Tensor>& zeros,
                const std::optional<Tensor>& perm,
                const std::optional<Tensor>& bias,
                int64_t bits,
                int64_t group_size,
                int64_t k,
                int64_t n,
                bool to_bytes) {
  const TiledWeight weight = check_tiled(tiles, scales, zeros, perm, bits, group_size, k, n);
  check_cpu("tiles", tiles);
  check_beside("x", x, tiles);
  check_floating("x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x is ", shape_of(x),
                  ", but must be [..., K] with K = ", k, ".");
  for (int64_t i = 0; perm && i < k; ++i) {
    const int32_t input = weight.tiled.perm[i];
    STD_TORCH_CHECK(input >= 0 && input < k, "perm[", i, "] is ", input, ", but must be in [0, ", k,
                    ").");
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    m *= x.size(i);
  }
  if (weight.tiled.run < kTile / 2) {
    return multiply_dense(x, weight, bias, group_size);
  }
  const Tensor rows = torch::stable::reshape(as_float(x), {m, k});
  Tensor y = torch::stable::new_empty(rows, shape);
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  const float* add = nullptr;
  std::optional<Tensor> addend;
  if (bias) {
    check_beside("bias", *bias, tiles);
    check_floating("bias", bias->scalar_type());
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias is ", shape_of(*bias),
                    ", but must be [N] = [", n, "].");
    addend = as_float(*bias);
    add = static_cast<const float*>(addend->const_data_ptr());
  }
  const Activations made = round_rows(weight.tiled, rows, to_bytes);
  const auto isa = auto_gptq_cpu_best_isa();
  constexpr int64_t kRows = 16;
  const int64_t per_block = std::max<int64_t>(kRows * k * m, 1);
  torch::stable::parallel_for(
      0, n / kRows, std::max<int64_t>(kCodesPerThread / per_block, 1),
      [&](int64_t first, int64_t last) {
        for (int64_t row = 0; row < m; ++row) {
          for (int64_t i = first * kRows; i < last * kRows; ++i) {
            out[row * n + i] = add ? add[i] : 0.0f;
          }
        }
        auto_gptq_cpu_multiply_tiles(&weight.tiled, &made.rounded, out, first * kRows,
                                     last * kRows, isa);
      });
  return y.scalar_type() == x.scalar_type() ? y : torch::stable::to(y, x.scalar_type());
}

// x in 15 bits: what is lost is less than a float16 loses.
Tensor q_matmul(const Tensor& x,
                const Tensor& tiles,
                const Tensor& scales,
                const std::optional<Tensor>& zeros,
                const std::optional<Tensor>& perm,
                const std::optional<Tensor>& bias,
                int64_t bits,
                int64_t group_size,
                int64_t k,
                int64_t n) {
  return multiply(x, tiles, scales, zeros, perm, bias, bits, group_size, k, n, false);
}

// x in 8 bits where it has many rows; few rows wait for memory, not for the products.
Tensor q_matmul_int8(const Tensor& x,
                     const Tensor& tiles,
                     const Tensor& scales,
                     const std::optional<Tensor>& zeros,
                     const std::optional<Tensor>& perm,
                     const std::optional<Tensor>& bias,
                     int64_t bits,
                     int64_t group_size,
                     int64_t k,
                     int64_t n) {
  return multiply(x, tiles, scales, zeros, perm, bias, bits, group_size, k, n, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CPU, m) {
  m.impl("q_matmul", TORCH_BOX(&q_matmul));
  m.impl("q_matmul_int8", TORCH_BOX(&q_matmul_int8));
}
