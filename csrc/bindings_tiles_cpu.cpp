// The operators over tiles on the CPU.
#include <vector>

#include "bindings_tiles.h"

namespace {

using namespace auto_gptq_bindings;

// Up to this many rows go through the codes as they lie; more are worth unfolding them.  Where that
// was as fast, measured at 4096 x 4096 with AVX2 and AVX-512.  With 4 bits there is one way for all.
constexpr int64_t few_rows(int32_t bits) {
  return bits == 4 ? 0 : bits == 8 ? 4 : bits == 3 ? 12 : 32;
}

// Rounded x, and the memory that it lies in.
struct Activations {
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;
  std::vector<int32_t> shifts;
  auto_gptq::Rounded rounded;
};

Activations round_rows(const auto_gptq::Tiled& weight, const Tensor& x, int64_t m, bool to_bytes) {
  const auto isa = auto_gptq_cpu_best_isa();
  const int64_t tiles = padded(weight.k) / kTile;
  const int32_t few = m <= few_rows(weight.bits) && isa != auto_gptq::kPortable;
  const int32_t terms = to_bytes && !(few && weight.bits == 8) ? 1 : 2;
  const int64_t bytes = terms * auto_gptq_cpu_bytes_of_x(weight.bits, few);
  Activations made{std::vector<int8_t>(m * tiles * bytes), std::vector<float>(m * tiles * 2),
                   std::vector<float>(m * tiles * 2),
                   std::vector<int32_t>(few && terms == 1 ? m * tiles * 8 : 0), {}};
  const int32_t unit = weight.bits != 8 && weight.group_size % (2 * kTile) == 0 ? 2 : 1;
  made.rounded = {m, terms, few, unit, made.codes.data(), made.scales.data(), made.sums.data(), made.shifts.data()};
  const auto* data = static_cast<const float*>(x.const_data_ptr());
  torch::stable::parallel_for(
      0, m, std::max<int64_t>(kCodesPerThread / std::max<int64_t>(weight.k, 1), 1),
      [&](int64_t begin, int64_t end) {
        auto_gptq_cpu_round(&weight, data, &made.rounded, begin, end, isa);
      });
  return made;
}

// Call work(begin, end) in parallel for ranges that make up [0, n), multiples of `step`.
template <typename Work>
void for_outputs(int64_t n, int64_t step, int64_t codes_per_output, const Work& work) {
  const int64_t per_step = std::max<int64_t>(step * codes_per_output, 1);
  torch::stable::parallel_for(0, (n + step - 1) / step,
                              std::max<int64_t>(kCodesPerThread / per_step, 1),
                              [&](int64_t first, int64_t last) {
                                work(first * step, std::min(last * step, n));
                              });
}

void check_range(const auto_gptq::Tiled& weight) {
  for (int64_t i = 0; weight.perm && i < weight.k; ++i) {
    const int32_t input = weight.perm[i];
    STD_TORCH_CHECK(input >= 0 && input < weight.k, "perm[", i, "] is ", input,
                    ", but must be in [0, ", weight.k, ").");
  }
}

Tensor repack_tiles(const Tensor& qweight,
                    const std::optional<Tensor>& perm,
                    int64_t bits,
                    int64_t group_size) {
  STD_TORCH_CHECK(qweight.dim() == 2 && bits > 0, "qweight is ", shape_of(qweight),
                  ", but must be [K / 32 * bits, N].");
  const int64_t k = qweight.size(0) / bits * 32, n = qweight.size(1);
  check_settings(bits, group_size, k, n);
  check_int32("qweight", qweight);
  check_matrix("qweight", qweight, k / 32 * bits, n, "[K / 32 * bits, N]");
  const Tensor words = as_contiguous(qweight);
  auto_gptq::Tiled tiled = describe_tiled(bits, group_size, k, n);
  std::optional<Tensor> order;
  if (perm) {
    check_perm(*perm, qweight, k);
    order = as_contiguous(*perm);
    tiled.perm = static_cast<const int32_t*>(order->const_data_ptr());
    check_range(tiled);
  }
  Tensor tiles =
      torch::stable::new_empty(qweight, {padded(n) / kTile, padded(k) / kTile, 128 * bits});
  const auto* from = static_cast<const int32_t*>(words.const_data_ptr());
  auto* to = static_cast<uint32_t*>(tiles.mutable_data_ptr());
  for_outputs(n, kTile, k, [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_repack_tiles(from, &tiled, to, begin, end);
  });
  return tiles;
}

Tensor unrepack_tiles(const Tensor& tiles,
                      const std::optional<Tensor>& perm,
                      int64_t bits,
                      int64_t group_size,
                      int64_t k,
                      int64_t n) {
  check_settings(bits, group_size, k, n);
  check_int32("tiles", tiles);
  auto_gptq::Tiled tiled = describe_tiled(bits, group_size, k, n);
  check_tiles(tiles, bits, k, n);
  const Tensor words = as_contiguous(tiles);
  tiled.tiles = static_cast<const uint32_t*>(words.const_data_ptr());
  std::optional<Tensor> order;
  if (perm) {
    check_perm(*perm, tiles, k);
    order = as_contiguous(*perm);
    tiled.perm = static_cast<const int32_t*>(order->const_data_ptr());
    check_range(tiled);
  }
  Tensor qweight = torch::stable::new_empty(tiles, {k / 32 * bits, n});
  auto* to = static_cast<int32_t*>(qweight.mutable_data_ptr());
  for_outputs(n, kTile, k, [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_unrepack_tiles(&tiled, to, begin, end);
  });
  return qweight;
}

Tensor dequantize(const TiledWeight& weight, ScalarType dtype) {
  const auto_gptq::Tiled& tiled = weight.tiled;
  Tensor dense = torch::stable::new_empty(weight.tiles, {tiled.n, tiled.k}, ScalarType::Float);
  auto* to = static_cast<float*>(dense.mutable_data_ptr());
  for_outputs(tiled.n, 16, tiled.k, [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_dequantize_tiles(&tiled, to + begin * tiled.k, begin, end);
  });
  return dtype == ScalarType::Float ? dense : torch::stable::to(dense, dtype);
}

Tensor dequantize_tiles(const Tensor& tiles,
                        const Tensor& scales,
                        const std::optional<Tensor>& zeros,
                        const std::optional<Tensor>& perm,
                        int64_t bits,
                        int64_t group_size,
                        int64_t k,
                        int64_t n,
                        ScalarType dtype) {
  check_floating("dtype", dtype);
  const TiledWeight weight = check_tiled(tiles, scales, zeros, perm, bits, group_size, k, n);
  check_cpu("tiles", tiles);
  check_range(weight.tiled);
  return dequantize(weight, dtype);
}

// Runs of 16 are in no kernel.
Tensor multiply_dense(const Tensor& x,
                      const TiledWeight& weight,
                      const std::optional<Tensor>& bias) {
  return linear(x, dequantize(weight, x.scalar_type()),
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
  if (bias) {
    check_beside("bias", *bias, tiles);
  }
  const auto [shape, m] = check_operands(x, bias, k, n);
  check_range(weight.tiled);
  if (weight.tiled.run < kTile / 2) {
    return multiply_dense(x, weight, bias);
  }
  const Tensor rows = as_float(x);
  Tensor y = torch::stable::new_empty(rows, shape);
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  std::optional<Tensor> addend;
  const float* add = nullptr;
  if (bias) {
    addend = as_float(*bias);
    add = static_cast<const float*>(addend->const_data_ptr());
  }
  const Activations made = round_rows(weight.tiled, rows, m, to_bytes);
  const auto isa = auto_gptq_cpu_best_isa();
  for_outputs(n, 32, k * std::max<int64_t>(m, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = begin; i < end; ++i) {
        out[row * n + i] = add ? add[i] : 0.0f;
      }
    }
    auto_gptq_cpu_multiply_tiles(&weight.tiled, &made.rounded, out, begin, end, isa);
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

// x in 8 bits.
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
  m.impl("repack_tiles", TORCH_BOX(&repack_tiles));
  m.impl("unrepack_tiles", TORCH_BOX(&unrepack_tiles));
  m.impl("dequantize_tiles", TORCH_BOX(&dequantize_tiles));
  m.impl("q_matmul", TORCH_BOX(&q_matmul));
  m.impl("q_matmul_int8", TORCH_BOX(&q_matmul_int8));
}
