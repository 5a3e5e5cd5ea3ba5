// torch.ops.auto_gptq.q_experts, sort_by_expert and combine_experts on the CPU: all experts' products
// in one call, threads over all.
#include <cstring>
#include <tuple>
#include <vector>

#include "bindings_experts.h"

namespace {

using namespace auto_gptq_bindings;

// Up to this many rows a row of x at a time goes through the codes as they lie.
constexpr int64_t kFewRows = 4;

// An expert that has rows, and its x in whole numbers.
struct Hit {
  int64_t first, count;  // rows
  auto_gptq::Tiled weight;
  const float* bias;
  auto_gptq::Rounded x;
};

// Memory of all hits' rounded x.
struct Memory {
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;
};

std::vector<int64_t> read_offsets(const Tensor& offsets, int64_t rows) {
  const Tensor own = as_contiguous(offsets);
  const auto* from = static_cast<const int32_t*>(own.const_data_ptr());
  std::vector<int64_t> read(from, from + own.numel());
  STD_TORCH_CHECK(read.front() == 0 && read.back() <= rows && std::is_sorted(read.begin(), read.end()),
                  "offsets must rise from 0 to at most the number of rows, ", rows, ".");
  return read;
}

// Rows of x in the order of y, in fp32.
Tensor sorted_rows(const Tensor& x, const std::optional<Tensor>& rows) {
  const Tensor wide = as_float(x);
  if (!rows) {
    return wide;
  }
  const int64_t m = rows->size(0), k = x.size(1), tokens = x.size(0);
  const Tensor own = as_contiguous(*rows);
  const auto* from = static_cast<const int32_t*>(own.const_data_ptr());
  Tensor sorted = torch::stable::new_empty(wide, {m, k});
  auto* to = static_cast<float*>(sorted.mutable_data_ptr());
  const auto* source = static_cast<const float*>(wide.const_data_ptr());
  for (int64_t s = 0; s < m; ++s) {
    STD_TORCH_CHECK(from[s] >= 0 && from[s] < tokens, "rows[", s, "] is ", from[s],
                    ", but must be in [0, ", tokens, ").");
    std::memcpy(to + s * k, source + from[s] * k, k * sizeof(float));
  }
  return sorted;
}

void check_range(const auto_gptq::Tiled& weight) {
  for (int64_t i = 0; weight.perm && i < weight.k; ++i) {
    const int32_t input = weight.perm[i];
    STD_TORCH_CHECK(input >= 0 && input < weight.k, "perm[", i, "] is ", input,
                    ", but must be in [0, ", weight.k, ").");
  }
}

// The weight of expert e, given that of expert 0.
auto_gptq::Tiled weight_of(const auto_gptq::Tiled& first, int64_t e) {
  auto_gptq::Tiled own = first;
  const int64_t grids = first.groups * padded(first.n);
  own.tiles += e * (padded(first.n) / kTile) * (padded(first.k) / kTile) * 128 * first.bits;
  own.scales = static_cast<const char*>(first.scales) +
               e * grids * (first.scale_type == auto_gptq::kFloat32 ? 4 : 2);
  own.zeros = first.zeros ? first.zeros + e * grids : nullptr;
  own.perm = first.perm ? first.perm + e * first.k : nullptr;
  check_range(own);
  return own;
}

std::vector<Hit> find_hits(const std::vector<int64_t>& offsets,
                           const auto_gptq::Tiled& first,
                           const float* bias) {
  std::vector<Hit> hits;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(offsets.size()); ++e) {
    const int64_t count = offsets[e + 1] - offsets[e];
    if (count > 0) {
      hits.push_back({offsets[e], count, weight_of(first, e), bias ? bias + e * first.n : nullptr, {}});
    }
  }
  return hits;
}

// Give each hit room for its x, and round it, threads over rows.
Memory round_all(std::vector<Hit>& hits, const float* x, bool to_bytes) {
  const auto isa = auto_gptq_cpu_best_isa();
  const auto_gptq::Tiled& any = hits.front().weight;
  const int64_t tiles = padded(any.k) / kTile, rows = hits.back().first + hits.back().count;
  const int32_t unit = any.bits != 8 && any.group_size % (2 * kTile) == 0 ? 2 : 1;
  Memory memory{{}, std::vector<float>(rows * tiles * 2), std::vector<float>(rows * tiles * 2)};
  std::vector<int64_t> at;
  int64_t bytes = 0;
  for (Hit& hit : hits) {
    const int32_t few =
        any.bits != 4 && hit.count <= kFewRows && isa != auto_gptq::kPortable;
    const int32_t terms = to_bytes && !few ? 1 : 2;
    const int64_t skipped = hit.first * tiles * 2;
    hit.x = {hit.count, terms, few, unit, nullptr, memory.scales.data() + skipped,
             memory.sums.data() + skipped};
    at.push_back(bytes);
    bytes += hit.count * tiles * terms * auto_gptq_cpu_bytes_of_x(any.bits, few);
  }
  memory.codes.resize(bytes);
  for (size_t i = 0; i < hits.size(); ++i) {
    hits[i].x.codes = memory.codes.data() + at[i];
  }
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(kCodesPerThread / any.k, 1), [&](int64_t begin, int64_t end) {
        for (const Hit& hit : hits) {
          const int64_t from = std::max(begin - hit.first, int64_t{0});
          const int64_t to = std::min(end - hit.first, hit.count);
          if (from < to) {
            auto_gptq_cpu_round(&hit.weight, x + hit.first * any.k, &hit.x, from, to, isa);
          }
        }
      });
  return memory;
}

// Columns [begin, end) of one expert's rows.
void multiply_columns(const Hit& hit, float* y, int64_t begin, int64_t end, auto_gptq::Isa isa) {
  const int64_t n = hit.weight.n;
  float* own = y + hit.first * n;
  for (int64_t row = 0; row < hit.count; ++row) {
    for (int64_t i = begin; i < end; ++i) {
      own[row * n + i] = hit.bias ? hit.bias[i] : 0.0f;
    }
  }
  auto_gptq_cpu_multiply_tiles(&hit.weight, &hit.x, own, begin, end, isa);
}

// Threads share out the columns of all experts by what they cost: a column is read, which costs as
// much as some rows, and multiplied by each row.
void multiply_all(const std::vector<Hit>& hits, float* y) {
  const auto isa = auto_gptq_cpu_best_isa();
  const int64_t n = hits.front().weight.n, k = hits.front().weight.k;
  const int64_t chunks = (n + kTile - 1) / kTile;
  std::vector<int64_t> start{0};
  for (const Hit& hit : hits) {
    start.push_back(start.back() + chunks * (kFewRows + hit.count));
  }
  const int64_t grain = std::max<int64_t>(kCodesPerThread / (kTile * k), 1) * kFewRows;
  torch::stable::parallel_for(0, start.back(), grain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < hits.size(); ++i) {
      const int64_t cost = kFewRows + hits[i].count;
      const auto reached = [&](int64_t limit) {  // chunks that start before it
        return std::clamp((limit - start[i] + cost - 1) / cost, int64_t{0}, chunks);
      };
      const int64_t from = begin > start[i] ? reached(begin) : 0;
      const int64_t to = end > start[i] ? reached(end) : 0;
      if (from < to) {
        multiply_columns(hits[i], y, from * kTile, std::min(to * kTile, n), isa);
      }
    }
  });
}

// Runs of 16 are in no kernel.
void multiply_dense(const std::vector<Hit>& hits, const Tensor& x, Tensor& y) {
  const int64_t n = hits.front().weight.n, k = hits.front().weight.k;
  Tensor dense = torch::stable::new_empty(x, {n, k});
  auto* to = static_cast<float*>(dense.mutable_data_ptr());
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  Tensor rows = x;
  for (const Hit& hit : hits) {
    for_columns(0, n, k, [&](int64_t begin, int64_t end) {
      auto_gptq_cpu_dequantize_tiles(&hit.weight, to + begin * k, begin, end);
    });
    const Tensor own = as_contiguous(
        linear(torch::stable::narrow(rows, 0, hit.first, hit.count), dense, std::nullopt));
    const auto* from = static_cast<const float*>(own.const_data_ptr());
    for (int64_t i = 0; i < hit.count * n; ++i) {
      out[hit.first * n + i] = from[i] + (hit.bias ? hit.bias[i % n] : 0.0f);
    }
  }
}

Tensor q_experts(const Tensor& x,
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
                 bool int8_activations) {
  const StackedWeight weight = check_experts(x, rows, offsets, tiles, scales, zeros, perm, bias,
                                             bits, group_size, k, n);
  const int64_t m = rows ? rows->size(0) : x.size(0);
  const std::vector<int64_t> ends = read_offsets(offsets, m);
  const Tensor sorted = sorted_rows(x, rows);
  const std::optional<Tensor> addend = weight.bias ? std::optional(as_float(*weight.bias)) : weight.bias;
  Tensor y = torch::stable::new_empty(sorted, {m, n});
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  std::vector<Hit> hits =
      find_hits(ends, weight.first.tiled,
                addend ? static_cast<const float*>(addend->const_data_ptr()) : nullptr);
  if (!hits.empty() && n > 0) {
    if (weight.first.tiled.run < kTile / 2 || k == 0) {
      multiply_dense(hits, sorted, y);
    } else {
      const Memory memory = round_all(
          hits, static_cast<const float*>(sorted.const_data_ptr()), int8_activations);
      multiply_all(hits, out);
    }
  }
  std::fill(out + ends.back() * n, out + m * n, 0.0f);
  return y.scalar_type() == x.scalar_type() ? y : torch::stable::to(y, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& index, int64_t experts) {
  check_index(index, experts);
  const Tensor numbers = as_contiguous(index.scalar_type() == ScalarType::Long
                                           ? index
                                           : torch::stable::to(index, ScalarType::Long));
  const int64_t size = index.numel(), top_k = index.size(1);
  Tensor rows = torch::stable::new_empty(index, {size}, ScalarType::Int);
  Tensor places = torch::stable::new_empty(index, {size}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(index, {experts + 1}, ScalarType::Int);
  const auto* number = static_cast<const int64_t*>(numbers.const_data_ptr());
  auto* row = static_cast<int32_t*>(rows.mutable_data_ptr());
  auto* place = static_cast<int32_t*>(places.mutable_data_ptr());
  auto* offset = static_cast<int32_t*>(offsets.mutable_data_ptr());
  const auto owner = [&](int64_t i) {
    return number[i] < 0 || number[i] >= experts ? experts : number[i];
  };
  std::vector<int32_t> next(experts + 2, 0);
  for (int64_t i = 0; i < size; ++i) {
    ++next[owner(i) + 1];
  }
  for (int64_t e = 0; e <= experts; ++e) {
    next[e + 1] += next[e];
    offset[e] = next[e];
  }
  for (int64_t i = 0; i < size; ++i) {
    place[i] = next[owner(i)]++;
    row[place[i]] = static_cast<int32_t>(i / top_k);
  }
  return {rows, places, offsets};
}

Tensor combine_experts(const Tensor& y, const Tensor& places, const Tensor& weights) {
  check_combine(y, places, weights);
  const int64_t tokens = weights.size(0), top_k = weights.size(1), n = y.size(1);
  const Tensor wide = as_float(y), from = as_contiguous(places), shares = as_float(weights);
  Tensor out = torch::stable::new_empty(wide, {tokens, n});
  const auto* rows = static_cast<const float*>(wide.const_data_ptr());
  const auto* place = static_cast<const int32_t*>(from.const_data_ptr());
  const auto* share = static_cast<const float*>(shares.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < tokens * top_k, "places[", i, "] is ", place[i],
                    ", but must be in [0, ", tokens * top_k, ").");
  }
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(kCodesPerThread / std::max<int64_t>(n * top_k, 1), 1),
      [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          float* sum = to + t * n;
          std::fill(sum, sum + n, 0.0f);
          for (int64_t at = t * top_k; at < (t + 1) * top_k; ++at) {
            const float* own = rows + place[at] * n;
            for (int64_t i = 0; i < n; ++i) {
              sum[i] += share[at] * own[i];
            }
          }
        }
      });
  return out.scalar_type() == y.scalar_type() ? out : torch::stable::to(out, y.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CPU, m) {
  m.impl("q_experts", TORCH_BOX(&q_experts));
  m.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  m.impl("combine_experts", TORCH_BOX(&combine_experts));
}
