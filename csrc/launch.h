// Every function that bindings.cpp may call.  No torch here: the kernels compile in seconds, and a
// plain main() or ctypes can call them.
//
// Letters: M rows of activations, K input channels, N output channels, G groups.  K and N are
// multiples of 32; a run of 32 codes along K is called a stream, so there are K / 32 of them.
#pragma once

#include <cstdint>

#define AUTO_GPTQ_API extern "C" __attribute__((visibility("default")))

namespace auto_gptq {

enum DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3 };

// One packed weight, all buffers contiguous: W[n, k] = (code[k, n] - zero[g, n]) * scale[g, n] with
// g = g_idx[k] and zero = (stored + zero_offset) modulo 2^bits.
struct Packed {
  const int32_t* qweight;       // [K / 32 * bits, N] codes packed along K
  const int32_t* qzeros;        // [G, N / 32 * bits] zeros packed along N
  const void* scales;           // [G, N] of scale_type
  const int32_t* g_idx;         // [K] every value in [0, G)
  const int32_t* stream_group;  // [K / 32] from auto_gptq_cpu_classify_streams
  int64_t k;
  int64_t n;
  int64_t groups;       // G
  int32_t bits;         // 2, 3, 4 or 8
  int32_t zero_offset;  // 1 for the format "gptq", 0 for "gptq_v2"
  DataType scale_type;
};

// Groups of columns of a weight that get their grids, held transposed: [B, N], B columns.
struct Fit {
  const float* weight;      // [B, N]
  const float* importance;  // [B] weight of each column's squared error
  const float* factors;     // [F] ranges to try, as shares of the min-max one; < 0: negative scales
  float* scales;            // out [G, N]
  float* zeros;             // out [G, N]
  int64_t columns;          // B
  int64_t candidates;       // F
  int64_t n;                // N
  int64_t weight_stride;    // from one column of the weight to the next, in elements
  int64_t group_size;       // columns per group; the last group may be short
  int32_t bits;
  int32_t symmetric;    // 1: the zero point is the middle code
  int32_t lowest_zero;  // the least zero point that may be chosen
  DataType scale_type;  // what scales are rounded to
};

// A block of columns of a weight that is being quantized, held transposed: [B, N], B columns.
struct Block {
  float* weight;         // in and out [B, N]: each column's error is taken out of the later ones
  const float* inverse;  // [B, B] upper triangular factor of the inverse Hessian
  const float* scales;   // [G, N] of every group
  const float* zeros;    // [G, N] whole numbers
  const int64_t* group;  // [B] the group of each column
  uint8_t* codes;        // out [B, N]
  float* errors;         // out [B, N]: rounding errors, divided by the factor's diagonal
  int64_t columns;       // B
  int64_t n;             // N
  int64_t weight_stride;   // from one column of the weight to the next, in elements
  int64_t inverse_stride;  // from one row of the factor to the next
  int32_t maxq;            // the largest code
};

// A weight as the solver gives it, all buffers contiguous:
// W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] with g = g_idx[k].
struct Solved {
  const uint8_t* codes;  // [N, K]
  const float* scales;   // [N, G]
  const int32_t* zeros;  // [N, G]
  const int32_t* g_idx;  // [K]
  int64_t n;             // N < 65536
  int64_t k;             // K
  int64_t groups;        // G
};

// A weight in tiles of 64 x 64, auto_gptq/formats/tiles.py has the picture.  N' and K' are N and K
// padded to whole tiles.  Inputs lie sorted by group: place k belongs to group k / group_size.
struct Tiled {
  const uint32_t* tiles;  // [N' / 64, K' / 64, 128 * bits], aligned to 16 bytes
  const void* scales;     // [G, N'] of scale_type
  const uint8_t* zeros;   // [G, N'], or null: each is 2^(bits - 1)
  const int32_t* perm;    // [K] the input at each place, or null: they lie in their own order
  int64_t k;              // K, a multiple of 32
  int64_t n;              // N, a multiple of 32
  int64_t groups;         // G
  int64_t group_size;     // a multiple of 16; K' if there is only one group
  int32_t bits;           // 2, 3, 4 or 8
  int32_t run;            // 16, 32 or 64 neighbouring places that share a scale
  DataType scale_type;
};

// Rows of x in whole numbers times scales.  They are in the order of the codes, in which the inputs
// of a tile have two halves, steps 0 and 1 and steps 2 and 3.
struct Rounded {
  int64_t m;      // M
  int32_t terms;  // 1: numbers of 8 bits.  2: numbers of 15 bits, 128 h + l
  int32_t few;    // 1: in the order for few rows; with 8 bits these take two terms
  int32_t unit;   // tiles that share a scale, 1 or 2; one term of many rows: each half has its own
  int8_t* codes;  // [M, K' / 64, terms, auto_gptq_cpu_bytes_of_x()]
  float* scales;  // [M, K' / 64, 2]
  float* sums;    // [M, K' / 64, 2] sums of x as it is after rounding
  int32_t* shifts;  // [M, K' / 64, 8] few rows of one term: words i and i + 8 of a tile, and those of
                    // the unit's second tile, are to be shifted to the left
};

// y = x W^T + bias on a GPU.
struct Product {
  Tiled weight;
  const void* x;     // [M, K] of type, contiguous, aligned to 16 bytes
  const void* bias;  // [N] of type, or null
  void* y;           // out [M, N] of type
  void* workspace;   // as many bytes as the plan says, of any content, aligned to 256 bytes
  int64_t m;         // M > 0
  DataType type;     // kFloat16 or kBFloat16
};

// How a product is computed: by a kernel, or (launch is null) dequantized and multiplied by cuBLAS.
struct Plan {
  const char* (*launch)(const Product*, void* stream);  // null, or what went wrong
  int64_t workspace;                                    // bytes
};

}  // namespace auto_gptq

// The widest instruction set that both this machine and this build have.
AUTO_GPTQ_API auto_gptq::Isa auto_gptq_cpu_best_isa();

// Find the streams whose 32 codes share one group.  Returns -1, or the first k whose group is
// outside [0, G), in which case nothing else may be called with this g_idx.
AUTO_GPTQ_API int64_t auto_gptq_cpu_classify_streams(
    const int32_t* g_idx,    // [K]
    int64_t k,               // K
    int64_t groups,          // G
    int32_t* stream_group);  // out [K / 32]: the group, or -1 where a stream mixes groups

// Write rows [n_begin, n_end) of the dense weight; both are multiples of 32.
AUTO_GPTQ_API void auto_gptq_cpu_dequantize(const auto_gptq::Packed* packed,
                                            int64_t n_begin,
                                            int64_t n_end,
                                            void* weight,  // out [n_end - n_begin, K] of type
                                            auto_gptq::DataType type,
                                            auto_gptq::Isa isa);

// Bring activations into the form that auto_gptq_cpu_q_linear reads.
AUTO_GPTQ_API void auto_gptq_cpu_prepare_activations(
    const float* x,  // [M, K]
    int64_t m,       // M
    int64_t k,       // K
    int32_t bits,
    float* scaled,  // out [M, K]: x / 2^(position of the code's field in its word), see packed.h
    float* sums);   // out [M, K / 32]: sum of x over each stream

// Write columns [n_begin, n_end) of y = x W^T + bias; both are multiples of 32.
AUTO_GPTQ_API void auto_gptq_cpu_q_linear(
    const auto_gptq::Packed* packed,
    const float* x,       // [M, K]
    const float* scaled,  // [M, K] from auto_gptq_cpu_prepare_activations
    const float* sums,    // [M, K / 32] from auto_gptq_cpu_prepare_activations
    int64_t m,            // M
    const float* bias,    // [N] or null
    float* y,             // out [M, N], only the columns of the range are touched
    int64_t n_begin,
    int64_t n_end,
    auto_gptq::Isa isa);

// Bytes of rounded x per tile and term.
AUTO_GPTQ_API int64_t auto_gptq_cpu_bytes_of_x(int32_t bits, int32_t few);

// Round rows [begin, end) of x into buffers that are as Rounded says.
AUTO_GPTQ_API void auto_gptq_cpu_round(const auto_gptq::Tiled* weight,
                                       const float* x,  // [M, K]
                                       const auto_gptq::Rounded* rounded,
                                       int64_t begin,
                                       int64_t end,
                                       auto_gptq::Isa isa);

// Add x W^T to columns [n_begin, n_end) of y; both are multiples of 16, with 4 bits of 32.
AUTO_GPTQ_API void auto_gptq_cpu_multiply_tiles(const auto_gptq::Tiled* weight,
                                                const auto_gptq::Rounded* x,
                                                float* y,  // in and out [M, N]
                                                int64_t n_begin,
                                                int64_t n_end,
                                                auto_gptq::Isa isa);

// Lay packed codes out in tiles, and back; n_begin and n_end are multiples of 64 (n_end may be N).
AUTO_GPTQ_API void auto_gptq_cpu_repack_tiles(
    const int32_t* qweight,          // [K / 32 * bits, N]
    const auto_gptq::Tiled* weight,  // only its sizes and perm are read
    uint32_t* tiles,                 // out [N' / 64, K' / 64, 128 * bits]
    int64_t n_begin,
    int64_t n_end);
AUTO_GPTQ_API void auto_gptq_cpu_unrepack_tiles(const auto_gptq::Tiled* weight,
                                                int32_t* qweight,  // out [K / 32 * bits, N]
                                                int64_t n_begin,
                                                int64_t n_end);

// Write rows [n_begin, n_end) of the dense weight; both are multiples of 16.
AUTO_GPTQ_API void auto_gptq_cpu_dequantize_tiles(
    const auto_gptq::Tiled* weight,  // columns stay sorted by group where perm is null
    float* dense,                    // out [n_end - n_begin, K]
    int64_t n_begin,
    int64_t n_end);

// Fit every group for the outputs [n_begin, n_end).
AUTO_GPTQ_API void auto_gptq_cpu_fit_grids(const auto_gptq::Fit* fit,
                                           int64_t n_begin,
                                           int64_t n_end,
                                           auto_gptq::Isa isa);

// Quantize all columns of a block for the outputs [n_begin, n_end).
AUTO_GPTQ_API void auto_gptq_cpu_solve_columns(const auto_gptq::Block* block,
                                               int64_t n_begin,
                                               int64_t n_end,
                                               auto_gptq::Isa isa);

// The same on the current GPU, asynchronously on a stream (a cudaStream_t).  All pointers are to the
// memory of that GPU.  They return null, or what went wrong.
AUTO_GPTQ_API const char* auto_gptq_cuda_fit_grids(const auto_gptq::Fit* fit, void* stream);

// At most 128 columns.
AUTO_GPTQ_API const char* auto_gptq_cuda_solve_columns(const auto_gptq::Block* block, void* stream);

// Quantize a whole matrix: all columns of the block, whose errors then are rounded to 11 bits, and
// whose rows lie side by side.  Where fit->group_size is not 0, it must divide 128, and the grids are
// fitted on the way, to the weights that 128 columns at a time have become.  Weight, inverse, errors
// and their rows are aligned to 16 bytes.
AUTO_GPTQ_API const char* auto_gptq_cuda_solve_matrix(const auto_gptq::Block* block,
                                                      const auto_gptq::Fit* fit,
                                                      float* loss,  // out [N]
                                                      void* stream);

// Pack codes along K, which is a multiple of 32; the codes are aligned to 16 bytes.
AUTO_GPTQ_API const char* auto_gptq_cuda_pack_codes(const uint8_t* codes,  // [N, K]
                                                    int64_t n,
                                                    int64_t k,
                                                    int32_t bits,    // 2, 3, 4 or 8
                                                    int32_t* words,  // out [K / 32 * bits, N]
                                                    void* stream);

AUTO_GPTQ_API const char* auto_gptq_cuda_dequantize_codes(const auto_gptq::Solved* codes,
                                                          void* weight,  // out [N, K] of type
                                                          auto_gptq::DataType type,
                                                          void* stream);

// Choose the kernel for a product from the measured table in q_matmul.cu; pointers are not read.
AUTO_GPTQ_API auto_gptq::Plan auto_gptq_cuda_plan(const auto_gptq::Product* product,
                                                  int32_t device);

// Lay packed codes out in tiles.
AUTO_GPTQ_API const char* auto_gptq_cuda_repack_tiles(
    const int32_t* qweight,          // [K / 32 * bits, N]
    const auto_gptq::Tiled* weight,  // its tiles are written; scales and zeros are not read
    void* stream);

// Write rows [n_begin, n_end), multiples of 64 (n_end may be N), of the dense weight.
AUTO_GPTQ_API const char* auto_gptq_cuda_dequantize_tiles(
    const auto_gptq::Tiled* weight,  // columns stay sorted by group where perm is null
    int64_t n_begin,
    int64_t n_end,
    void* dense,  // out [n_end - n_begin, K] of type
    auto_gptq::DataType type,
    void* stream);
