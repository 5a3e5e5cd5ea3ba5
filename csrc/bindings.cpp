// torch.ops.auto_gptq.dequantize and q_linear on the CPU.
//
// One binary serves every torch from 2.10 on, with or without CUDA: it uses the stable ABI alone.
// auto_gptq/kernels/ops.py defines the schemas.
#include <vector>

#include "bindings.h"

namespace {

using namespace auto_gptq_bindings;

// Up to this many rows the kernel that reads packed words wins; beyond, a dense product does.
constexpr int64_t kFewRows = 32;

// Bytes of dense fp32 weight that exist at once: small enough to be in cache when the product reads
// it, large enough to keep a few dozen threads busy.
constexpr int64_t kPanelBytes = 16 << 20;

// A checked weight, and the tensors that keep its pointers alive.
struct Weight {
  Tensor qweight, qzeros, scales, g_idx;
  std::vector<int32_t> stream_group;
  auto_gptq::Packed packed;
};

Weight check_weight(const Tensor& qweight,
                    const Tensor& qzeros,
                    const Tensor& scales,
                    const Tensor& g_idx,
                    int64_t bits,
                    int64_t zero_offset) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is ", bits,
                  ", but must be 2, 3, 4 or 8.");
  STD_TORCH_CHECK(zero_offset == 0 || zero_offset == 1, "zero_offset is ", zero_offset,
                  ", but must be 0 or 1.");
  check_int32("qweight", qweight);
  check_int32("qzeros", qzeros);
  check_int32("g_idx", g_idx);
  check_cpu("scales", scales);
  check_floating("scales", scales.scalar_type());
  STD_TORCH_CHECK(g_idx.dim() == 1 && g_idx.size(0) % 32 == 0, "g_idx is ", shape_of(g_idx),
                  ", but must be [K] with K a multiple of 32.");
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(1) % 32 == 0, "scales is ", shape_of(scales),
                  ", but must be [G, N] with N a multiple of 32.");
  const int64_t k = g_idx.size(0), groups = scales.size(0), n = scales.size(1);
  check_matrix("qweight", qweight, k / 32 * bits, n, "[K / 32 * bits, N]");
  check_matrix("qzeros", qzeros, groups, n / 32 * bits, "[G, N / 32 * bits]");

  Weight weight{as_contiguous(qweight), as_contiguous(qzeros),        as_contiguous(scales),
                as_contiguous(g_idx),   std::vector<int32_t>(k / 32), {}};
  const auto* group = static_cast<const int32_t*>(weight.g_idx.const_data_ptr());
  const int64_t bad = auto_gptq_cpu_classify_streams(group, k, groups, weight.stream_group.data());
  STD_TORCH_CHECK(bad < 0, "g_idx[", bad, "] is ", group[bad], ", but must be in [0, ", groups,
                  "), the rows of scales.");
  weight.packed = {static_cast<const int32_t*>(weight.qweight.const_data_ptr()),
                   static_cast<const int32_t*>(weight.qzeros.const_data_ptr()),
                   weight.scales.const_data_ptr(),
                   group,
                   weight.stream_group.data(),
                   k,
                   n,
                   groups,
                   static_cast<int32_t>(bits),
                   static_cast<int32_t>(zero_offset),
                   *data_type(scales.scalar_type())};
  return weight;
}

void write_dense(const auto_gptq::Packed& packed,
                 int64_t begin,
                 int64_t end,
                 const Tensor& out,
                 auto_gptq::DataType type) {
  char* rows = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = packed.k * static_cast<int64_t>(out.element_size());
  for_columns(begin, end, packed.k, [&](int64_t n_begin, int64_t n_end) {
    auto_gptq_cpu_dequantize(&packed, n_begin, n_end, rows + (n_begin - begin) * row_bytes, type,
                             auto_gptq_cpu_best_isa());
  });
}

Tensor dequantize(const Tensor& qweight,
                  const Tensor& qzeros,
                  const Tensor& scales,
                  const Tensor& g_idx,
                  int64_t bits,
                  int64_t zero_offset,
                  ScalarType dtype) {
  const Weight weight = check_weight(qweight, qzeros, scales, g_idx, bits, zero_offset);
  check_floating("dtype", dtype);
  const auto_gptq::Packed& packed = weight.packed;
  Tensor out = torch::stable::new_empty(weight.qweight, {packed.n, packed.k}, dtype);
  write_dense(packed, 0, packed.n, out, *data_type(dtype));
  return out;
}

Tensor multiply_few_rows(const Weight& weight,
                         const Tensor& x,  // [M, K] fp32
                         const std::optional<Tensor>& bias,
                         const std::vector<int64_t>& shape) {  // of the result, M * N in all
  const auto_gptq::Packed& packed = weight.packed;
  const int64_t m = x.size(0);
  const auto* data = static_cast<const float*>(x.const_data_ptr());
  std::vector<float> scaled(m * packed.k), sums(m * packed.k / 32);
  auto_gptq_cpu_prepare_activations(data, m, packed.k, packed.bits, scaled.data(), sums.data());
  const auto* add = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  Tensor y = torch::stable::new_empty(x, shape);
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  for_columns(0, packed.n, packed.k * m, [&](int64_t n_begin, int64_t n_end) {
    auto_gptq_cpu_q_linear(&packed, data, scaled.data(), sums.data(), m, add, out, n_begin, n_end,
                           auto_gptq_cpu_best_isa());
  });
  return y;
}

std::optional<Tensor> slice(const std::optional<Tensor>& bias, int64_t begin, int64_t count) {
  if (!bias) {
    return std::nullopt;
  }
  Tensor all = *bias;
  return torch::stable::narrow(all, 0, begin, count);
}

// Many rows: unfold a panel of the weight, multiply by it, go on.  The whole fp32 weight would be
// fresh pages from the system at every call, which costs more than the unfolding.
Tensor multiply_many_rows(const Weight& weight,
                          const Tensor& x,  // [M, K] fp32
                          const std::optional<Tensor>& bias,
                          const std::vector<int64_t>& shape,  // of the result, M * N in all
                          ScalarType type) {
  const auto_gptq::Packed& packed = weight.packed;
  const int64_t width =
      std::min(packed.n, std::max<int64_t>(kPanelBytes / 4 / packed.k / 32, 1) * 32);
  Tensor panel = torch::stable::new_empty(x, {width, packed.k});
  Tensor y = torch::stable::new_empty(x, shape, type);
  Tensor rows = torch::stable::view(y, {x.size(0), packed.n});
  for (int64_t n = 0; n < packed.n; n += width) {
    const int64_t count = std::min(width, packed.n - n);
    write_dense(packed, n, n + count, panel, auto_gptq::kFloat32);
    const Tensor product =
        linear(x, torch::stable::narrow(panel, 0, 0, count), slice(bias, n, count));
    Tensor columns = torch::stable::narrow(rows, 1, n, count);
    torch::stable::copy_(columns, product);
  }
  return y;
}

Tensor q_linear(const Tensor& x,
                const Tensor& qweight,
                const Tensor& qzeros,
                const Tensor& scales,
                const Tensor& g_idx,
                const std::optional<Tensor>& bias,
                int64_t bits,
                int64_t zero_offset) {
  const Weight weight = check_weight(qweight, qzeros, scales, g_idx, bits, zero_offset);
  const int64_t k = weight.packed.k, n = weight.packed.n;
  check_cpu("x", x);
  if (bias) {
    check_cpu("bias", *bias);
  }
  const auto [shape, m] = check_operands(x, bias, k, n);
  const std::optional<Tensor> addend = bias ? std::optional(as_float(*bias)) : bias;
  const Tensor rows = torch::stable::reshape(as_float(x), {m, k});
  // Autograd lets nobody write into a result that is a view, as PEFT's AdaLoRA does: so it is
  // allocated in its final shape.  K = 0 stays with the packed kernel, for which an empty sum is
  // nothing special.
  Tensor y = m <= kFewRows || k == 0
                 ? multiply_few_rows(weight, rows, addend, shape)
                 : multiply_many_rows(weight, rows, addend, shape, x.scalar_type());
  if (y.scalar_type() != x.scalar_type()) {
    y = torch::stable::to(y, x.scalar_type());
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("q_linear", TORCH_BOX(&q_linear));
}
