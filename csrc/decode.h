// The small operations between the products of one decoding step, a token for each row of a batch.
//
// Letters: B rows, H hidden channels, Q query heads, P heads of keys and values (Q a multiple of P),
// D channels of a head, R of them rotated, S positions that the cache holds.  All floating-point
// buffers have one type; sums are fp32.  No torch here.
#pragma once

#include "launch.h"

namespace auto_gptq {

// hidden += update; normed = hidden / rms(hidden) * weight.
struct AddNorm {
  void* hidden;        // in and out [B, H]; only read if update is null
  const void* update;  // [B, H] or null
  const void* weight;  // [H]
  void* normed;        // out [B, H]
  int64_t rows;
  int64_t channels;  // H, a multiple of 8, at most kMostNormChannels
  float epsilon;
  DataType type;
};

constexpr int64_t kMostNormChannels = 16384;

// out = silu(gate) * up, or with gelu (its tanh form) in the place of silu.
struct Gate {
  const void* gate_up;  // [B, 2 * I]: gate, then up
  void* out;            // [B, I]
  int64_t rows;
  int64_t channels;  // I, a multiple of 8
  int32_t gelu;
  DataType type;
};

// y = x W^T for a dense weight.
struct Dense {
  const float* x;      // [M, K]
  const void* weight;  // [N, K] of type
  float* y;            // out [M, N]
  int64_t m;
  int64_t n;
  int64_t k;  // a multiple of 8
  DataType type;
};

// Put the token of the highest logit, of equal ones the first, at the end of each row.
struct AppendBest {
  const void* logits;     // [B, V]
  int64_t* tokens;        // in and out [B, S]
  const int64_t* length;  // [1] the place of the new token in a row
  uint8_t* ended;         // in and out [B]: a row that has ended gets padding
  const int64_t* stops;   // [stop_count] a row ends with one of these
  int64_t rows;
  int64_t vocabulary;  // V
  int64_t capacity;    // S
  int64_t stop_count;
  int64_t padding;
  DataType type;
};

// Rotate the new query and key, append key and value to the cache, attend to the cache.
//
// While the kernel before still runs, length, first and what the cache holds are read already: they
// must be older, that is, a kernel that was launched in the usual way must stand between.
struct DecodeAttention {
  const void* qkv;     // [B, (Q + 2 P) * D]: queries, keys, values
  const void* cosine;  // [positions, R] the angles of each half are given twice
  const void* sine;    // [positions, R]
  const void* q_norm;  // [D] weight of an RMS norm over a query head before the rotation, or null
  const void* k_norm;  // [D] or null
  void* keys;          // in and out [B, P, S, D]
  void* values;        // in and out [B, P, S, D]
  const int64_t* length;  // [1] tokens in the cache so far; the new one is put at this place
  const int64_t* first;   // [B] the first place of a row that counts (left padding); its position is
                          // 0
  void* out;              // [B, Q * D]
  float* partial;         // scratch [B, Q, splits, D + 2]
  int32_t* arrived;       // scratch [B * P * shares]: zero before and after
  int64_t batch;
  int32_t query_heads;
  int32_t kv_heads;
  int32_t head_channels;  // D, a multiple of 8, at most 256
  int32_t rotated;        // R, a multiple of 2, at most D
  int64_t capacity;       // S
  int32_t splits;         // most parts of the cache that are attended to side by side, 1 to kMostSplits
  float scale;            // of the scores
  float epsilon;          // of the norms
  DataType type;
};

constexpr int32_t kMostSplits = 32;

// Query heads of one key head that share a read of the cache.
inline int32_t heads_per_share(int32_t group) {
  return group % 4 == 0 ? 4 : group % 2 == 0 ? 2 : 1;
}

}  // namespace auto_gptq

// Asynchronously on a stream (a cudaStream_t) of the current GPU.  They return null, or what went
// wrong.  On compute capability 9.0 and later a kernel starts while the one before it still runs, and
// waits for its results.
AUTO_GPTQ_API const char* auto_gptq_cuda_add_norm(const auto_gptq::AddNorm* task, void* stream);
AUTO_GPTQ_API const char* auto_gptq_cuda_gate(const auto_gptq::Gate* task, void* stream);
AUTO_GPTQ_API const char* auto_gptq_cuda_append_best(const auto_gptq::AppendBest* task,
                                                     void* stream);
AUTO_GPTQ_API const char* auto_gptq_cuda_decode_attention(const auto_gptq::DecodeAttention* task,
                                                          void* stream);

// The same on the CPU, for rows [begin, end).
AUTO_GPTQ_API void auto_gptq_cpu_add_norm(const auto_gptq::AddNorm* task,
                                          int64_t begin,
                                          int64_t end,
                                          auto_gptq::Isa isa);
AUTO_GPTQ_API void auto_gptq_cpu_gate(const auto_gptq::Gate* task,
                                      int64_t begin,
                                      int64_t end,
                                      auto_gptq::Isa isa);

// Put the new keys and values of all rows into the cache.  partial and arrived are not used.
AUTO_GPTQ_API void auto_gptq_cpu_decode_append(const auto_gptq::DecodeAttention* task,
                                               auto_gptq::Isa isa);

// Then attend: query heads [begin, end) of the B * Q of all rows.
AUTO_GPTQ_API void auto_gptq_cpu_decode_attend(const auto_gptq::DecodeAttention* task,
                                               int64_t begin,
                                               int64_t end,
                                               auto_gptq::Isa isa);

// Write columns [begin, end) of y.  Only on x86-64, and only with AVX2.
AUTO_GPTQ_API void auto_gptq_cpu_multiply_dense(const auto_gptq::Dense* task,
                                                int64_t begin,
                                                int64_t end);
