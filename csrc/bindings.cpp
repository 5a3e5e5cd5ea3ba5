// The operators of torch.ops.auto_gptq: checks, allocation, threads, streams.
//
// The only file that includes torch, and only its stable ABI: one binary serves every torch from
// 2.10 on, with or without CUDA.  auto_gptq/kernels/ops.py defines the schemas.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Up to this many rows the kernel that reads packed words wins; beyond, a dense product does.
constexpr int64_t kFewRows = 32;

// Bytes of dense fp32 weight that exist at once: small enough to be in cache when the product reads
// it, large enough to keep a few dozen threads busy.
constexpr int64_t kPanelBytes = 16 << 20;

// Codes a thread should get before it is worth waking.
constexpr int64_t kCodesPerThread = 1 << 16;

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

std::optional<auto_gptq::DataType> data_type(ScalarType type) {
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

void check_floating(const char* name, ScalarType type) {
  STD_TORCH_CHECK(data_type(type), name, " is ", torch::headeronly::toString(type),
                  ", but must be Float, Half or BFloat16.");
}

void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, but the other tensors are.");
}

void check_int32(const char* name, const Tensor& tensor) {
  check_cpu(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", but must be Int.");
}

void check_matrix(
    const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const char* meaning) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  " is ", shape_of(tensor), ", but must be ", meaning, " = [", rows, ", ", columns,
                  "].");
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor as_float(const Tensor& tensor) {
  return as_contiguous(tensor.scalar_type() == ScalarType::Float
                           ? tensor
                           : torch::stable::to(tensor, ScalarType::Float));
}

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

// Call work(n_begin, n_end) in parallel for ranges that make up [begin, end), all multiples of 32.
template <typename Work>
void for_columns(int64_t begin, int64_t end, int64_t codes_per_column, const Work& work) {
  const int64_t per_block = std::max<int64_t>(32 * codes_per_column, 1);
  torch::stable::parallel_for(begin / 32, end / 32,
                              std::max<int64_t>(kCodesPerThread / per_block, 1),
                              [&](int64_t first, int64_t last) { work(32 * first, 32 * last); });
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

Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
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
        dense_linear(x, torch::stable::narrow(panel, 0, 0, count), slice(bias, n, count));
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
  check_floating("x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x is ", shape_of(x),
                  ", but must be [..., K] with K = ", k, ".");
  std::optional<Tensor> addend;
  if (bias) {
    check_cpu("bias", *bias);
    check_floating("bias", bias->scalar_type());
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias is ", shape_of(*bias),
                    ", but must be [N] = [", n, "].");
    addend = as_float(*bias);
  }

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    m *= x.size(i);
  }
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

void check_like(const char* name, const Tensor& tensor, const Tensor& weight) {
  STD_TORCH_CHECK(tensor.is_cpu() == weight.is_cpu() &&
                      tensor.get_device_index() == weight.get_device_index(),
                  name, " is not on the device of weight.");
}

void check_rows(
    const char* name, const Tensor& tensor, const Tensor& weight, int64_t rows, int64_t columns) {
  check_like(name, tensor, weight);
  check_matrix(name, tensor, rows, columns, "the shape");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.stride(1) == 1, name,
                  " must be Float with contiguous rows.");
}

void check_vector(
    const char* name, const Tensor& tensor, const Tensor& weight, int64_t size, ScalarType type) {
  check_like(name, tensor, weight);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == type &&
                      tensor.is_contiguous(),
                  name, " is ", shape_of(tensor), " of ",
                  torch::headeronly::toString(tensor.scalar_type()), ", but must be a contiguous [",
                  size, "] of ", torch::headeronly::toString(type), ".");
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

#ifdef AUTO_GPTQ_CUDA
// Found at run time, so that the library also loads beside a torch without CUDA.
void* current_stream(int32_t device) {
  using Find = int (*)(int32_t, void**);
  static const Find find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Find>(
        library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(find, "this torch has no CUDA.");
  void* stream = nullptr;
  STD_TORCH_CHECK(find(device, &stream) == 0, "there is no stream for device ", device, ".");
  return stream;
}

template <typename Task>
void run_on_gpu(const Tensor& like, const char* (*launch)(const Task*, void*), const Task& task) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* failure = launch(&task, current_stream(device));
  STD_TORCH_CHECK(!failure, "the kernel did not start: ", failure ? failure : "");
}
#endif

std::tuple<Tensor, Tensor> fit_grids(const Tensor& weight,
                                     const Tensor& importance,
                                     const Tensor& factors,
                                     int64_t group_size,
                                     int64_t bits,
                                     bool symmetric,
                                     int64_t lowest_zero,
                                     ScalarType scale_dtype) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight is ", shape_of(weight), ", but must be [B, N].");
  const int64_t columns = weight.size(0), n = weight.size(1);
  STD_TORCH_CHECK(group_size > 0, "group_size is ", group_size, ", but must be positive.");
  check_rows("weight", weight, weight, columns, n);
  check_vector("importance", importance, weight, columns, ScalarType::Float);
  check_vector("factors", factors, weight, factors.size(0), ScalarType::Float);
  check_floating("scale_dtype", scale_dtype);
  const int64_t groups = (columns + group_size - 1) / group_size;
  Tensor scales = torch::stable::new_empty(weight, {groups, n});
  Tensor zeros = torch::stable::new_empty(weight, {groups, n});
  const auto_gptq::Fit fit{floats(weight),
                           floats(importance),
                           floats(factors),
                           static_cast<float*>(scales.mutable_data_ptr()),
                           static_cast<float*>(zeros.mutable_data_ptr()),
                           columns,
                           factors.size(0),
                           n,
                           weight.stride(0),
                           group_size,
                           static_cast<int32_t>(bits),
                           symmetric ? 1 : 0,
                           static_cast<int32_t>(lowest_zero),
                           *data_type(scale_dtype)};
#ifdef AUTO_GPTQ_CUDA
  if (!weight.is_cpu()) {
    run_on_gpu(weight, auto_gptq_cuda_fit_grids, fit);
    return {scales, zeros};
  }
#endif
  for_columns(0, (n + 31) / 32 * 32, columns * fit.candidates, [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_fit_grids(&fit, begin, std::min(end, n), auto_gptq_cpu_best_isa());
  });
  return {scales, zeros};
}

void solve_columns(const Tensor& weight,
                   const Tensor& codes,
                   const Tensor& errors,
                   const Tensor& inverse,
                   const Tensor& scales,
                   const Tensor& zeros,
                   const Tensor& group,
                   int64_t maxq) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight is ", shape_of(weight), ", but must be [B, N].");
  STD_TORCH_CHECK(scales.dim() == 2, "scales is ", shape_of(scales), ", but must be [G, N].");
  const int64_t columns = weight.size(0), n = weight.size(1);
  check_rows("weight", weight, weight, columns, n);
  check_rows("errors", errors, weight, columns, n);
  check_like("codes", codes, weight);
  check_matrix("codes", codes, columns, n, "the shape");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() &&
                      errors.is_contiguous(),
                  "codes must be contiguous Byte, and errors contiguous.");
  check_rows("inverse", inverse, weight, columns, columns);
  check_rows("scales", scales, weight, scales.size(0), n);
  check_rows("zeros", zeros, weight, scales.size(0), n);
  STD_TORCH_CHECK(scales.is_contiguous() && zeros.is_contiguous(),
                  "scales and zeros must be contiguous.");
  check_vector("group", group, weight, columns, ScalarType::Long);
  const auto* of_column = static_cast<const int64_t*>(group.const_data_ptr());
  for (int64_t i = 0; weight.is_cpu() && i < columns; ++i) {
    STD_TORCH_CHECK(of_column[i] >= 0 && of_column[i] < scales.size(0), "group[", i, "] is ",
                    of_column[i], ", but must be in [0, ", scales.size(0), ").");
  }
  const auto_gptq::Block block{static_cast<float*>(weight.mutable_data_ptr()),
                               floats(inverse),
                               floats(scales),
                               floats(zeros),
                               of_column,
                               static_cast<uint8_t*>(codes.mutable_data_ptr()),
                               static_cast<float*>(errors.mutable_data_ptr()),
                               columns,
                               n,
                               weight.stride(0),
                               inverse.stride(0),
                               static_cast<int32_t>(maxq)};
#ifdef AUTO_GPTQ_CUDA
  if (!weight.is_cpu()) {
    run_on_gpu(weight, auto_gptq_cuda_solve_columns, block);
    return;
  }
#endif
  for_columns(0, (n + 31) / 32 * 32, columns * columns, [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_solve_columns(&block, begin, std::min(end, n), auto_gptq_cpu_best_isa());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("q_linear", TORCH_BOX(&q_linear));
  m.impl("fit_grids", TORCH_BOX(&fit_grids));
  m.impl("solve_columns", TORCH_BOX(&solve_columns));
}

#ifdef AUTO_GPTQ_CUDA
STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CUDA, m) {
  m.impl("fit_grids", TORCH_BOX(&fit_grids));
  m.impl("solve_columns", TORCH_BOX(&solve_columns));
}
#endif
