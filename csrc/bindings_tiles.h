// Check a weight in tiles, on any device.
#pragma once

#include <algorithm>
#include <optional>

#include "bindings.h"

namespace auto_gptq_bindings {

constexpr int64_t kTile = 64;  // outputs and inputs of a tile

inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Kernels read vectors of 16 bytes; the memory of a slice may begin anywhere.
inline Tensor as_vectors(const Tensor& tensor) {
  Tensor whole = as_contiguous(tensor);
  return is_aligned(whole) ? whole : torch::stable::clone(whole);
}

// A checked weight, and the tensors that keep its pointers alive.
struct TiledWeight {
  Tensor tiles, scales;
  std::optional<Tensor> zeros, perm;
  auto_gptq::Tiled tiled;
};

inline void check_beside(const char* name, const Tensor& tensor, const Tensor& tiles) {
  STD_TORCH_CHECK(tensor.is_cpu() == tiles.is_cpu() &&
                      tensor.get_device_index() == tiles.get_device_index(),
                  name, " is not on the device of tiles.");
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", but must be ",
                  torch::headeronly::toString(type), ".");
}

inline void check_settings(int64_t bits, int64_t group_size, int64_t k, int64_t n) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is ", bits,
                  ", but must be 2, 3, 4 or 8.");
  STD_TORCH_CHECK(group_size == -1 || (group_size > 0 && group_size % 16 == 0), "group_size is ",
                  group_size, ", but must be -1 or a multiple of 16.");
  STD_TORCH_CHECK(k >= 0 && k % 32 == 0 && n >= 0 && n % 32 == 0, "the weight is ", n, " x ", k,
                  ", but both must be multiples of 32.");
}

inline int64_t padded(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

// The fields of a weight that follow from its settings, as formats/tiles.py defines them.
inline auto_gptq::Tiled describe_tiled(int64_t bits, int64_t group_size, int64_t k, int64_t n) {
  const bool one_group = group_size == -1 || group_size >= k;
  auto_gptq::Tiled tiled{};
  tiled.k = k;
  tiled.n = n;
  tiled.groups = one_group ? 1 : (k + group_size - 1) / group_size;
  tiled.group_size = one_group ? padded(k) : group_size;
  tiled.bits = static_cast<int32_t>(bits);
  tiled.run = static_cast<int32_t>(
      one_group ? kTile : std::min<int64_t>(group_size & -group_size, kTile));
  return tiled;
}

inline void check_perm(const Tensor& perm, const Tensor& beside, int64_t k) {
  check_beside("perm", perm, beside);
  check_type("perm", perm, ScalarType::Int);
  STD_TORCH_CHECK(perm.dim() == 1 && perm.size(0) == k, "perm is ", shape_of(perm),
                  ", but must be [K] = [", k, "].");
}

inline void check_tiles(const Tensor& tiles, int64_t bits, int64_t k, int64_t n) {
  check_type("tiles", tiles, ScalarType::Int);
  const int64_t rows = padded(n) / kTile, columns = padded(k) / kTile;
  STD_TORCH_CHECK(tiles.dim() == 3 && tiles.size(0) == rows && tiles.size(1) == columns &&
                      tiles.size(2) == 128 * bits,
                  "tiles is ", shape_of(tiles), ", but must be [", rows, ", ", columns, ", ",
                  128 * bits, "].");
}

inline TiledWeight check_tiled(const Tensor& tiles,
                               const Tensor& scales,
                               const std::optional<Tensor>& zeros,
                               const std::optional<Tensor>& perm,
                               int64_t bits,
                               int64_t group_size,
                               int64_t k,
                               int64_t n) {
  check_settings(bits, group_size, k, n);
  auto_gptq::Tiled tiled = describe_tiled(bits, group_size, k, n);
  const int64_t width = padded(n);
  check_tiles(tiles, bits, k, n);
  check_beside("scales", scales, tiles);
  check_floating("scales", scales.scalar_type());
  check_matrix("scales", scales, tiled.groups, width, "[G, N padded to 64]");
  TiledWeight weight{as_vectors(tiles), as_vectors(scales), std::nullopt, std::nullopt, tiled};
  if (zeros) {
    check_beside("zeros", *zeros, tiles);
    check_type("zeros", *zeros, ScalarType::Byte);
    check_matrix("zeros", *zeros, tiled.groups, width, "[G, N padded to 64]");
    weight.zeros = as_vectors(*zeros);
    weight.tiled.zeros = static_cast<const uint8_t*>(weight.zeros->const_data_ptr());
  }
  if (perm) {
    check_perm(*perm, tiles, k);
    weight.perm = as_vectors(*perm);
    weight.tiled.perm = static_cast<const int32_t*>(weight.perm->const_data_ptr());
  }
  weight.tiled.tiles = static_cast<const uint32_t*>(weight.tiles.const_data_ptr());
  weight.tiled.scales = weight.scales.const_data_ptr();
  weight.tiled.scale_type = *data_type(scales.scalar_type());
  return weight;
}

}  // namespace auto_gptq_bindings
