// torch.ops.auto_gptq.fit_grids and solve_columns on the CPU and on NVIDIA GPUs.
#include <tuple>
#include <utility>

#include "bindings_cuda.h"

namespace {

using namespace auto_gptq_bindings;

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
    run_on_gpu(weight, [&](void* stream) { return auto_gptq_cuda_fit_grids(&fit, stream); });
    return {scales, zeros};
  }
#endif
  for_columns(0, (n + 31) / 32 * 32, columns * fit.candidates, [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_fit_grids(&fit, begin, std::min(end, n), auto_gptq_cpu_best_isa());
  });
  return {scales, zeros};
}

// Check the arguments that both solvers of columns take.
auto_gptq::Block check_block(const Tensor& weight,
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
  return {static_cast<float*>(weight.mutable_data_ptr()),
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
}

void solve_columns(const Tensor& weight,
                   const Tensor& codes,
                   const Tensor& errors,
                   const Tensor& inverse,
                   const Tensor& scales,
                   const Tensor& zeros,
                   const Tensor& group,
                   int64_t maxq) {
  const auto_gptq::Block block =
      check_block(weight, codes, errors, inverse, scales, zeros, group, maxq);
#ifdef AUTO_GPTQ_CUDA
  if (!weight.is_cpu()) {
    run_on_gpu(weight,
               [&](void* stream) { return auto_gptq_cuda_solve_columns(&block, stream); });
    return;
  }
#endif
  for_columns(0, (block.n + 31) / 32 * 32, block.columns * block.columns,
              [&](int64_t begin, int64_t end) {
                auto_gptq_cpu_solve_columns(&block, begin, std::min(end, block.n),
                                            auto_gptq_cpu_best_isa());
              });
}

#ifdef AUTO_GPTQ_CUDA
Tensor solve_matrix(const Tensor& weight,
                    const Tensor& codes,
                    const Tensor& errors,
                    const Tensor& inverse,
                    const Tensor& scales,
                    const Tensor& zeros,
                    const Tensor& group,
                    const Tensor& importance,
                    const Tensor& factors,
                    int64_t group_size,
                    int64_t bits,
                    bool symmetric,
                    int64_t lowest_zero,
                    ScalarType scale_dtype) {
  const auto_gptq::Block block = check_block(weight, codes, errors, inverse, scales, zeros, group,
                                             (int64_t{1} << bits) - 1);
  check_vector("importance", importance, weight, block.columns, ScalarType::Float);
  check_vector("factors", factors, weight, factors.size(0), ScalarType::Float);
  check_floating("scale_dtype", scale_dtype);
  STD_TORCH_CHECK(weight.is_contiguous(), "weight must be contiguous.");
  for (const Tensor* tensor : {&weight, &errors, &inverse}) {
    STD_TORCH_CHECK(tensor->stride(0) % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0,
                    "weight, errors and inverse must have rows aligned to 16 bytes.");
  }
  STD_TORCH_CHECK(
      group_size == 0 || scales.size(0) >= (block.columns + group_size - 1) / group_size,
      "scales has ", scales.size(0), " groups, too few for groups of ", group_size, ".");
  const auto_gptq::Fit fit{nullptr,
                           floats(importance),
                           floats(factors),
                           static_cast<float*>(scales.mutable_data_ptr()),
                           static_cast<float*>(zeros.mutable_data_ptr()),
                           block.columns,
                           factors.size(0),
                           block.n,
                           block.n,
                           group_size,
                           static_cast<int32_t>(bits),
                           symmetric ? 1 : 0,
                           static_cast<int32_t>(lowest_zero),
                           *data_type(scale_dtype)};
  Tensor loss = torch::stable::new_empty(weight, {block.n});
  run_on_gpu(weight, [&](void* stream) {
    return auto_gptq_cuda_solve_matrix(&block, &fit, static_cast<float*>(loss.mutable_data_ptr()),
                                       stream);
  });
  return loss;
}

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) % 32 == 0 &&
                      codes.scalar_type() == ScalarType::Byte,
                  "codes is ", shape_of(codes), ", but must be Byte [N, K], K a multiple of 32.");
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is ", bits,
                  ", but must be 2, 3, 4 or 8.");
  const Tensor given = as_contiguous(codes);
  const int64_t n = codes.size(0), k = codes.size(1);
  Tensor words = torch::stable::new_empty(codes, {k / 32 * bits, n}, ScalarType::Int);
  run_on_gpu(codes, [&](void* stream) {
    return auto_gptq_cuda_pack_codes(static_cast<const uint8_t*>(given.const_data_ptr()), n, k,
                                     static_cast<int32_t>(bits),
                                     static_cast<int32_t*>(words.mutable_data_ptr()), stream);
  });
  return words;
}

Tensor dequantize_codes(const Tensor& codes,
                        const Tensor& scales,
                        const Tensor& zeros,
                        const Tensor& g_idx,
                        ScalarType dtype) {
  STD_TORCH_CHECK(codes.dim() == 2 && scales.dim() == 2, "codes and scales must be matrices.");
  const int64_t n = codes.size(0), k = codes.size(1), groups = scales.size(1);
  check_matrix("scales", scales, n, groups, "[N, G]");
  check_matrix("zeros", zeros, n, groups, "[N, G]");
  check_like("scales", scales, codes);
  check_like("zeros", zeros, codes);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte &&
                      scales.scalar_type() == ScalarType::Float &&
                      zeros.scalar_type() == ScalarType::Int,
                  "codes, scales and zeros must be Byte, Float and Int.");
  check_vector("g_idx", g_idx, codes, k, ScalarType::Int);
  check_floating("dtype", dtype);
  const Tensor of[3] = {as_contiguous(codes), as_contiguous(scales), as_contiguous(zeros)};
  const auto_gptq::Solved given{static_cast<const uint8_t*>(of[0].const_data_ptr()),
                               floats(of[1]),
                               static_cast<const int32_t*>(of[2].const_data_ptr()),
                               static_cast<const int32_t*>(g_idx.const_data_ptr()),
                               n,
                               k,
                               groups};
  Tensor weight = torch::stable::new_empty(codes, {n, k}, dtype);
  // A launch has less than 65536 blocks along N.
  constexpr int64_t kMost = 32768;
  for (int64_t begin = 0; begin < n; begin += kMost) {
    auto_gptq::Solved part = given;
    part.codes += begin * k;
    part.scales += begin * groups;
    part.zeros += begin * groups;
    part.n = std::min(kMost, n - begin);
    char* to = static_cast<char*>(weight.mutable_data_ptr()) +
               begin * k * (dtype == ScalarType::Float ? 4 : 2);
    run_on_gpu(codes, [&](void* stream) {
      return auto_gptq_cuda_dequantize_codes(&part, to, *data_type(dtype), stream);
    });
  }
  return weight;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CPU, m) {
  m.impl("fit_grids", TORCH_BOX(&fit_grids));
  m.impl("solve_columns", TORCH_BOX(&solve_columns));
}

#ifdef AUTO_GPTQ_CUDA
STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CUDA, m) {
  m.impl("fit_grids", TORCH_BOX(&fit_grids));
  m.impl("solve_columns", TORCH_BOX(&solve_columns));
  m.impl("solve_matrix", TORCH_BOX(&solve_matrix));
  m.impl("pack_codes", TORCH_BOX(&pack_codes));
  m.impl("dequantize_codes", TORCH_BOX(&dequantize_codes));
}
#endif
