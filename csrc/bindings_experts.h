// Check the weights of all experts of a projection, on any device.
#pragma once

#include "bindings_tiles.h"

namespace auto_gptq_bindings {

// Give what is expert e's of a tensor that holds all experts'.
inline Tensor of_expert(const Tensor& tensor, int64_t e) { return torch::stable::select(tensor, 0, e); }

inline std::optional<Tensor> of_expert(const std::optional<Tensor>& tensor, int64_t e) {
  return tensor ? std::optional(of_expert(*tensor, e)) : std::nullopt;
}

inline void check_stacked(const char* name, const Tensor& tensor, int64_t experts, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.dim() == dimensions && tensor.size(0) == experts, name, " is ",
                  shape_of(tensor), ", but must hold one of ", dimensions - 1,
                  " dimensions for each of ", experts, " experts.");
}

// All experts' weights, checked; `first` describes that of expert 0.
struct StackedWeight {
  Tensor tiles, scales;
  std::optional<Tensor> zeros, perm, bias;
  TiledWeight first;
};

inline StackedWeight check_experts(const Tensor& x,
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
                            int64_t n) {
  STD_TORCH_CHECK(tiles.dim() == 4 && tiles.size(0) > 0, "tiles is ", shape_of(tiles),
                  ", but must be [E, N / 64, K / 64, 128 * bits] with E > 0.");
  const int64_t experts = tiles.size(0);
  check_stacked("scales", scales, experts, 3);
  if (zeros) {
    check_stacked("zeros", *zeros, experts, 3);
  }
  if (perm) {
    check_stacked("perm", *perm, experts, 2);
  }
  check_floating("x", x.scalar_type());
  check_beside("x", x, tiles);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == k, "x is ", shape_of(x),
                  ", but must be [T, K] with K = ", k, ".");
  check_beside("offsets", offsets, tiles);
  check_type("offsets", offsets, ScalarType::Int);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == experts + 1, "offsets is ",
                  shape_of(offsets), ", but must be [E + 1] = [", experts + 1, "].");
  if (rows) {
    check_beside("rows", *rows, tiles);
    check_type("rows", *rows, ScalarType::Int);
    STD_TORCH_CHECK(rows->dim() == 1, "rows is ", shape_of(*rows), ", but must be [S].");
  }
  StackedWeight made{as_vectors(tiles),
                     as_vectors(scales),
                     zeros ? std::optional(as_vectors(*zeros)) : zeros,
                     perm ? std::optional(as_vectors(*perm)) : perm,
                     std::nullopt,
                     {}};
  made.first = check_tiled(of_expert(made.tiles, 0), of_expert(made.scales, 0),
                           of_expert(made.zeros, 0), of_expert(made.perm, 0), bits, group_size, k, n);
  if (bias) {
    check_beside("bias", *bias, tiles);
    check_floating("bias", bias->scalar_type());
    check_matrix("bias", *bias, experts, n, "[E, N]");
    made.bias = as_contiguous(*bias);
  }
  return made;
}

inline void check_index(const Tensor& index, int64_t experts) {
  STD_TORCH_CHECK(index.dim() == 2 && index.size(1) > 0, "index is ", shape_of(index),
                  ", but must be [T, top_k].");
  STD_TORCH_CHECK(experts > 0 && experts < (1 << 20) && index.numel() < (1 << 30), "there are ",
                  experts, " experts and ", index.numel(),
                  " entries, but there must be 1 to 2^20 and fewer than 2^30.");
}

inline void check_combine(const Tensor& y, const Tensor& places, const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 2, "weights is ", shape_of(weights),
                  ", but must be [T, top_k].");
  const int64_t entries = weights.size(0) * weights.size(1);
  check_type("places", places, ScalarType::Int);
  STD_TORCH_CHECK(places.dim() == 1 && places.size(0) == entries, "places is ", shape_of(places),
                  ", but must be [T * top_k] = [", entries, "].");
  STD_TORCH_CHECK(y.dim() == 2 && y.size(0) == entries, "y is ", shape_of(y),
                  ", but must be [T * top_k, N] with T * top_k = ", entries, ".");
  check_beside("places", places, y);
  check_beside("weights", weights, y);
  check_floating("weights", weights.scalar_type());
  check_floating("y", y.scalar_type());
}

}  // namespace auto_gptq_bindings
