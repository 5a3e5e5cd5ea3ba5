// torch.ops.auto_gptq.add_norm, gate, decode_attention and append_best on the CPU and on NVIDIA GPUs.
#include "bindings_cuda.h"
#include "decode.h"

namespace {

using namespace auto_gptq_bindings;

void check_same(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index() &&
          tensor.scalar_type() == like.scalar_type() && tensor.is_contiguous(),
      name, " must be contiguous, on the device of the first tensor and of its type, ",
      torch::headeronly::toString(like.scalar_type()), "; it is ",
      torch::headeronly::toString(tensor.scalar_type()), ".");
}

void check_vector(const char* name, const Tensor& tensor, int64_t size, const char* meaning) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " is ", shape_of(tensor),
                  ", but must be ", meaning, " = [", size, "].");
}

void check_index(const char* name, const Tensor& tensor, const Tensor& like, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index() &&
          tensor.scalar_type() == type && tensor.is_contiguous(),
      name, " must be contiguous ", torch::headeronly::toString(type),
      " on the device of the first tensor.");
}

void check_rows_of_eight(const char* name, const Tensor& tensor, int64_t most) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) % 8 == 0 && tensor.size(1) <= most, name,
                  " is ", shape_of(tensor), ", but must be [rows, channels], the channels a ",
                  "multiple of 8 and at most ", most, ".");
  check_floating(name, tensor.scalar_type());
  check_same(name, tensor, tensor);
}

// Rows that a thread should get before it is worth waking.
int64_t rows_per_thread(int64_t operations_per_row) {
  return std::max<int64_t>(kCodesPerThread / std::max<int64_t>(operations_per_row, 1), 1);
}

const void* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

Tensor add_norm(const Tensor& hidden,
                const std::optional<Tensor>& update,
                const Tensor& weight,
                double epsilon) {
  check_rows_of_eight("hidden", hidden, auto_gptq::kMostNormChannels);
  const int64_t rows = hidden.size(0), channels = hidden.size(1);
  if (update) {
    check_same("update", *update, hidden);
    check_matrix("update", *update, rows, channels, "the shape of hidden");
  }
  check_same("weight", weight, hidden);
  check_vector("weight", weight, channels, "[channels]");
  Tensor normed = torch::stable::new_empty(hidden, {rows, channels});
  const auto_gptq::AddNorm task{hidden.mutable_data_ptr(),
                                pointer_or_null(update),
                                weight.const_data_ptr(),
                                normed.mutable_data_ptr(),
                                rows,
                                channels,
                                static_cast<float>(epsilon),
                                *data_type(hidden.scalar_type())};
#ifdef AUTO_GPTQ_CUDA
  if (!hidden.is_cpu()) {
    run_on_gpu(hidden, [&](void* stream) { return auto_gptq_cuda_add_norm(&task, stream); });
    return normed;
  }
#endif
  torch::stable::parallel_for(0, rows, rows_per_thread(channels), [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_add_norm(&task, begin, end, auto_gptq_cpu_best_isa());
  });
  return normed;
}

Tensor gate(const Tensor& gate_up, bool gelu) {
  check_rows_of_eight("gate_up", gate_up, INT32_MAX);
  const int64_t rows = gate_up.size(0), channels = gate_up.size(1) / 2;
  STD_TORCH_CHECK(channels % 8 == 0, "gate_up is ", shape_of(gate_up),
                  ", but half of its channels must be a multiple of 8.");
  Tensor out = torch::stable::new_empty(gate_up, {rows, channels});
  const auto_gptq::Gate task{gate_up.const_data_ptr(),
                             out.mutable_data_ptr(),
                             rows,
                             channels,
                             gelu ? 1 : 0,
                             *data_type(gate_up.scalar_type())};
#ifdef AUTO_GPTQ_CUDA
  if (!gate_up.is_cpu()) {
    run_on_gpu(gate_up, [&](void* stream) { return auto_gptq_cuda_gate(&task, stream); });
    return out;
  }
#endif
  torch::stable::parallel_for(0, rows, rows_per_thread(channels), [&](int64_t begin, int64_t end) {
    auto_gptq_cpu_gate(&task, begin, end, auto_gptq_cpu_best_isa());
  });
  return out;
}

// Up to this many rows wait for the weight to come from memory; more are torch's.
constexpr int64_t kFewRows = 8;

Tensor dense_matmul(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x is ",
                  shape_of(x), " and weight is ", shape_of(weight),
                  ", but they must be [rows, K] and [N, K].");
  check_cpu("weight", weight);
  const int64_t m = x.size(0), n = weight.size(0), k = x.size(1);
#ifdef __x86_64__
  const auto type = data_type(weight.scalar_type());
  if (m <= kFewRows && k % 8 == 0 && type && weight.is_contiguous() &&
      auto_gptq_cpu_best_isa() >= auto_gptq::kAvx2) {
    check_floating("x", x.scalar_type());
    const Tensor rows = as_float(x);
    Tensor y = torch::stable::new_empty(rows, {m, n});
    const auto_gptq::Dense task{static_cast<const float*>(rows.const_data_ptr()),
                                weight.const_data_ptr(),
                                static_cast<float*>(y.mutable_data_ptr()),
                                m,
                                n,
                                k,
                                *type};
    torch::stable::parallel_for(0, n, rows_per_thread(k), [&](int64_t begin, int64_t end) {
      auto_gptq_cpu_multiply_dense(&task, begin, end);
    });
    return y.scalar_type() == x.scalar_type() ? y : torch::stable::to(y, x.scalar_type());
  }
#endif
  return linear(x, weight, std::nullopt);
}

// On the CPU what the places are is known here; on a GPU only the kernel sees them.
void check_places(const auto_gptq::DecodeAttention& task) {
  const int64_t length = *task.length;
  STD_TORCH_CHECK(length >= 0 && length < task.capacity, "length is ", length,
                  ", but the cache has room for ", task.capacity, " tokens.");
  for (int64_t row = 0; row < task.batch; ++row) {
    STD_TORCH_CHECK(task.first[row] >= 0 && task.first[row] <= length, "first[", row, "] is ",
                    task.first[row], ", but must be in [0, ", length, "].");
  }
}

Tensor decode_attention(const Tensor& qkv,
                        const Tensor& cosine,
                        const Tensor& sine,
                        const std::optional<Tensor>& q_norm,
                        const std::optional<Tensor>& k_norm,
                        const Tensor& keys,
                        const Tensor& values,
                        const Tensor& length,
                        const Tensor& first,
                        const Tensor& partial,
                        const Tensor& arrived,
                        double scale,
                        double epsilon) {
  check_rows_of_eight("qkv", qkv, INT32_MAX);
  for (const auto& [name, cache] : {std::pair{"keys", &keys}, std::pair{"values", &values}}) {
    check_same(name, *cache, qkv);
    STD_TORCH_CHECK(cache->dim() == 4 && cache->size(0) == qkv.size(0) && cache->size(2) > 0, name,
                    " is ", shape_of(*cache), ", but must be [B, P, S, D] with B = ", qkv.size(0),
                    ".");
  }
  const int64_t batch = keys.size(0), kv_heads = keys.size(1), d = keys.size(3);
  STD_TORCH_CHECK(d > 0 && d % 8 == 0 && d <= 256, "heads have ", d,
                  " channels, but must have a multiple of 8 and at most 256.");
  const int64_t query_heads = qkv.size(1) / d - 2 * kv_heads;
  STD_TORCH_CHECK(qkv.size(1) % d == 0 && query_heads > 0 && query_heads % kv_heads == 0, "qkv is ",
                  shape_of(qkv), ", but must be [B, (Q + 2 P) * D] with P = ", kv_heads,
                  ", D = ", d, " and Q a multiple of P.");
  check_same("cosine", cosine, qkv);
  check_same("sine", sine, qkv);
  STD_TORCH_CHECK(cosine.dim() == 2 && cosine.size(1) % 2 == 0 && cosine.size(1) <= d &&
                      cosine.size(0) >= keys.size(2),
                  "cosine is ", shape_of(cosine), ", but must be [positions, R], R even and at most ",
                  d, ", with a row for each of ", keys.size(2), " positions.");
  check_matrix("sine", sine, cosine.size(0), cosine.size(1), "the shape of cosine");
  for (const auto& [name, norm] : {std::pair{"q_norm", &q_norm}, std::pair{"k_norm", &k_norm}}) {
    if (*norm) {
      check_same(name, **norm, qkv);
      check_vector(name, **norm, d, "[D]");
    }
  }
  check_index("length", length, qkv, ScalarType::Long);
  check_vector("length", length, 1, "[1]");
  check_index("first", first, qkv, ScalarType::Long);
  check_vector("first", first, batch, "[B]");
  check_index("partial", partial, qkv, ScalarType::Float);
  check_index("arrived", arrived, qkv, ScalarType::Int);
  STD_TORCH_CHECK(partial.dim() == 4 && partial.size(0) == batch &&
                      partial.size(1) == query_heads && partial.size(2) >= 1 &&
                      partial.size(2) <= auto_gptq::kMostSplits && partial.size(3) == d + 2,
                  "partial is ", shape_of(partial), ", but must be [B, Q, splits, D + 2] = [", batch,
                  ", ", query_heads, ", 1 to ", auto_gptq::kMostSplits, ", ", d + 2, "].");
  check_vector("arrived", arrived, batch * query_heads, "[B * Q]");
  Tensor out = torch::stable::new_empty(qkv, {batch, query_heads * d});
  const auto_gptq::DecodeAttention task{qkv.const_data_ptr(),
                                        cosine.const_data_ptr(),
                                        sine.const_data_ptr(),
                                        pointer_or_null(q_norm),
                                        pointer_or_null(k_norm),
                                        keys.mutable_data_ptr(),
                                        values.mutable_data_ptr(),
                                        static_cast<const int64_t*>(length.const_data_ptr()),
                                        static_cast<const int64_t*>(first.const_data_ptr()),
                                        out.mutable_data_ptr(),
                                        static_cast<float*>(partial.mutable_data_ptr()),
                                        static_cast<int32_t*>(arrived.mutable_data_ptr()),
                                        batch,
                                        static_cast<int32_t>(query_heads),
                                        static_cast<int32_t>(kv_heads),
                                        static_cast<int32_t>(d),
                                        static_cast<int32_t>(cosine.size(1)),
                                        keys.size(2),
                                        static_cast<int32_t>(partial.size(2)),
                                        static_cast<float>(scale),
                                        static_cast<float>(epsilon),
                                        *data_type(qkv.scalar_type())};
#ifdef AUTO_GPTQ_CUDA
  if (!qkv.is_cpu()) {
    run_on_gpu(qkv, [&](void* stream) { return auto_gptq_cuda_decode_attention(&task, stream); });
    return out;
  }
#endif
  check_places(task);
  auto_gptq_cpu_decode_append(&task, auto_gptq_cpu_best_isa());
  torch::stable::parallel_for(
      0, batch * query_heads, rows_per_thread(2 * d * (*task.length + 1)),
      [&](int64_t begin, int64_t end) {
        auto_gptq_cpu_decode_attend(&task, begin, end, auto_gptq_cpu_best_isa());
      });
  return out;
}

#ifdef AUTO_GPTQ_CUDA
void append_best(const Tensor& logits,
                 const Tensor& tokens,
                 const Tensor& length,
                 const Tensor& ended,
                 const std::optional<Tensor>& stops,
                 int64_t padding) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits is ", shape_of(logits),
                  ", but must be [B, V].");
  check_floating("logits", logits.scalar_type());
  check_same("logits", logits, logits);
  check_index("tokens", tokens, logits, ScalarType::Long);
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == logits.size(0), "tokens is ",
                  shape_of(tokens), ", but must be [B, S] with B = ", logits.size(0), ".");
  check_index("length", length, logits, ScalarType::Long);
  check_vector("length", length, 1, "[1]");
  check_index("ended", ended, logits, ScalarType::Bool);
  check_vector("ended", ended, logits.size(0), "[B]");
  if (stops) {
    check_index("stops", *stops, logits, ScalarType::Long);
    check_vector("stops", *stops, stops->size(0), "[*]");
  }
  const auto_gptq::AppendBest task{logits.const_data_ptr(),
                                   static_cast<int64_t*>(tokens.mutable_data_ptr()),
                                   static_cast<const int64_t*>(length.const_data_ptr()),
                                   static_cast<uint8_t*>(ended.mutable_data_ptr()),
                                   static_cast<const int64_t*>(pointer_or_null(stops)),
                                   logits.size(0),
                                   logits.size(1),
                                   tokens.size(1),
                                   stops ? stops->size(0) : 0,
                                   padding,
                                   *data_type(logits.scalar_type())};
  run_on_gpu(logits, [&](void* stream) { return auto_gptq_cuda_append_best(&task, stream); });
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("dense_matmul", TORCH_BOX(&dense_matmul));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

#ifdef AUTO_GPTQ_CUDA
STABLE_TORCH_LIBRARY_IMPL(auto_gptq, CUDA, m) {
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("append_best", TORCH_BOX(&append_best));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
#endif
