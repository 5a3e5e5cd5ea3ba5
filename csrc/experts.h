// Products of a mixture of experts, where each expert has rows and a weight of its own.
//
// Letters: E experts, T rows of x, S rows of y, sorted by expert; the others as in launch.h.  No
// torch here.
#pragma once

#include "launch.h"

namespace auto_gptq {

// y = x W^T + bias, for each expert's rows.
struct Experts {
  Tiled weight;            // of expert 0; in every buffer those of the others follow
  int64_t experts;         // E
  const void* x;           // [T, K] of type, aligned to 16 bytes
  const int32_t* rows;     // [S] the row of x that a row of y comes from, or null: its own
  const int32_t* offsets;  // [E + 1] from 0 on: expert e has the rows offsets[e] to offsets[e + 1]
  const void* bias;        // [E, N] of type, or null
  void* y;                 // out [S, N] of type; 0 behind the last expert's rows
  void* workspace;         // as many bytes as asked for, of any content, aligned to 16 bytes
  int64_t m;               // S > 0
  DataType type;           // kFloat16 or kBFloat16
};

// Which rows belong to an expert.
struct Sort {
  const int64_t* index;  // [S] an expert's number; what is not below E belongs to nobody
  int32_t* rows;         // out [S] sorted by expert: number of the entry / top_k
  int32_t* places;       // out [S] where each entry went
  int32_t* offsets;      // out [E + 1] as above
  int64_t size;          // S
  int64_t experts;       // E
  int64_t top_k;         // entries per token
};

// out[t] = the sum of weights[t, j] y[places[t, j]] over j, in fp32.
struct Combine {
  const void* y;          // [S, N] of type
  const int32_t* places;  // [T, top_k]
  const void* weights;    // [T, top_k] of weight_type
  void* out;              // [T, N] of type
  int64_t tokens;         // T
  int64_t top_k;
  int64_t n;  // N
  DataType type;         // any
  DataType weight_type;  // any
};

}  // namespace auto_gptq

// Bytes of workspace for a product; pointers are not read, but whether they are null.
AUTO_GPTQ_API int64_t auto_gptq_cuda_experts_bytes(const auto_gptq::Experts* experts);

// Asynchronously on a stream (a cudaStream_t) of the current GPU, of sm_80 or later.  They return
// null, or what went wrong.
AUTO_GPTQ_API const char* auto_gptq_cuda_q_experts(const auto_gptq::Experts* experts, void* stream);
AUTO_GPTQ_API const char* auto_gptq_cuda_sort(const auto_gptq::Sort* sort, void* stream);
AUTO_GPTQ_API const char* auto_gptq_cuda_combine(const auto_gptq::Combine* combine, void* stream);
