// torch.ops.auto_gptq.repack_tiles, dequantize_tiles and q_matmul on NVIDIA GPUs.
#include "bindings_tiles.h"

#include <vector>

#include "bindings_cuda.h"

#ifdef AUTO_GPTQ_CUDA
namespace {

using namespace auto_gptq_bindings;

Tensor repack_tiles(const Tensor& qweight,
                    const std::optional<Tensor>& perm,
                    int64_t bits,
                    int64_t group_size) {
  STD_TORCH_CHECK(qweight.dim() == 2 && bits > 0, "qweight is ", shape_of(qweight),
                  ", but must be [K / 32 * bits, N].");
  const int64_t k = qweight.size(0) / bits * 32, n = qweight.size(1);
  check_settings(bits, group_size, k, n);
  check_type("qweight", qweight, ScalarType::Int);
  check_matrix("qweight", qweight, k / 32 * bits, n, "[K / 32 * bits, N]");
  const Tensor words = as_contiguous(qweight);
  auto_gptq::Tiled tiled = describe_tiled(bits, group_size, k, n);
  std::optional<Tensor> order;
  if (perm) {
    check_perm(*perm, qweight, k);
    order = as_contiguous(*perm);
    tiled.perm = static_cast<const int32_t*>(order->const_data_ptr());
  }
  Tensor tiles =
      torch::stable::new_empty(qweight, {padded(n) / kTile, padded(k) / kTile, 128 * bits});
  if (tiles.numel() > 0) {
    tiled.tiles = static_cast<const uint32_t*>(tiles.mutable_data_ptr());
    run_on_gpu(qweight, [&](void* stream) {
      return auto_gptq_cuda_repack_tiles(static_cast<const int32_t*>(words.const_data_ptr()),
                                         &tiled, stream);
    });
  }
  return tiles;
}

Tensor dequantize_rows(const TiledWeight& weight, int64_t begin, int64_t end, ScalarType dtype) {
  Tensor dense = torch::stable::new_empty(weight.tiles, {end - begin, weight.tiled.k}, dtype);
  if (dense.numel() > 0) {
    run_on_gpu(weight.tiles, [&](void* stream) {
      return auto_gptq_cuda_dequantize_tiles(&weight.tiled, begin, end, dense.mutable_data_ptr(),
                                             *data_type(dtype), stream);
    });
  }
  return dense;
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
  return dequantize_rows(weight, 0, n, dtype);
}

// Bytes of dense weight that exist at once where there are many rows of x: they stay in the L2 cache
// between the kernel that writes them and the product that reads them.
constexpr int64_t kPanelBytes = 32 << 20;

// Outputs of a panel are a multiple of this, or cuBLAS would leave multiprocessors idle.
constexpr int64_t kPanelStep = 256;

// From so many rows on, panels cost less than they save (measured on an H100).
constexpr int64_t kRowsForPanels = 2048;

// Unfold a panel of the weight, multiply by it, go on.
Tensor multiply_panels(const TiledWeight& weight,
                       const Tensor& x,                      // [M, K]
                       const std::vector<int64_t>& shape) {  // of the result, M * N in all
  const int64_t k = weight.tiled.k, n = weight.tiled.n;
  const int64_t panel_size = static_cast<int64_t>(x.element_size()) * k * n;
  const int64_t panels = (panel_size + kPanelBytes - 1) / kPanelBytes;
  const int64_t width = (n / panels + kPanelStep - 1) / kPanelStep * kPanelStep;
  Tensor y = torch::stable::new_empty(x, shape);
  Tensor rows = torch::stable::view(y, {x.size(0), n});
  for (int64_t begin = 0; begin < n; begin += width) {
    const int64_t end = std::min(begin + width, n);
    Tensor panel = dequantize_rows(weight, begin, end, x.scalar_type());
    Tensor columns = torch::stable::narrow(rows, 1, begin, end - begin);
    std::array<StableIValue, 3> stack{
        torch::stable::detail::from(x),
        torch::stable::detail::from(torch::stable::transpose(panel, 0, 1)),
        torch::stable::detail::from(columns)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // owns a reference
  }
  return y;
}

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
  const TiledWeight weight = check_tiled(tiles, scales, zeros, perm, bits, group_size, k, n);
  check_beside("x", x, tiles);
  check_floating("x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x is ", shape_of(x),
                  ", but must be [..., K] with K = ", k, ".");
  std::optional<Tensor> addend;
  if (bias) {
    check_beside("bias", *bias, tiles);
    check_floating("bias", bias->scalar_type());
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias is ", shape_of(*bias),
                    ", but must be [N] = [", n, "].");
    addend = as_contiguous(bias->scalar_type() == x.scalar_type()
                               ? *bias
                               : torch::stable::to(*bias, x.scalar_type()));
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    m *= x.size(i);
  }
  const auto type = *data_type(x.scalar_type());
  auto_gptq::Product product{weight.tiled, nullptr, nullptr, nullptr, nullptr, m, type};
  const bool is_plain = m == 0 || k == 0 || n == 0 || type == auto_gptq::kFloat32;
  const auto_gptq::Plan plan = is_plain
                                   ? auto_gptq::Plan{}
                                   : auto_gptq_cuda_plan(&product, x.get_device_index());
  if (!plan.launch && m >= kRowsForPanels && !addend && k > 0 && n > 0) {
    return multiply_panels(weight, torch::stable::reshape(x, {m, k}), shape);
  }
  if (!plan.launch) {
    return linear(x, dequantize_rows(weight, 0, n, x.scalar_type()), addend);
  }
  const Tensor rows = as_vectors(x);
  Tensor y = torch::stable::new_empty(rows, shape);
  Tensor workspace = torch::stable::new_empty(rows, {plan.workspace}, ScalarType::Byte);
  product.x = rows.const_data_ptr();
  product.bias = addend ? addend->const_data_ptr() : nullptr;
  product.y = y.mutable_data_ptr();
  product.workspace = workspace.mutable_data_ptr();
  run_on_gpu(x, [&](void* stream) { return plan.launch(&product, stream); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CUDA, m) {
  m.impl("repack_tiles", TORCH_BOX(&repack_tiles));
  m.impl("dequantize_tiles", TORCH_BOX(&dequantize_tiles));
  m.impl("q_matmul", TORCH_BOX(&q_matmul));
}
#endif
