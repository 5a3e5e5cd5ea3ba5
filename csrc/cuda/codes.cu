// The solver's integers as a checkpoint's words, and as the weights that they stand for.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../launch.h"
#include "device.h"

namespace auto_gptq {
namespace {

constexpr int kStream = 32;    // codes that fill whole words at every width
constexpr int kThreads = 256;

// One thread: a stream of one output.  Neighbours write neighbouring words.
template <int BITS>
__global__ void pack_codes_kernel(const uint8_t* codes, int64_t n, int64_t k, int32_t* words) {
  const int64_t output = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t stream = blockIdx.y;
  if (output >= n) return;
  const uint4* from = reinterpret_cast<const uint4*>(codes + output * k + stream * kStream);
  const uint4 pieces[2] = {from[0], from[1]};
  const uint32_t bytes[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                             pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
  uint32_t packed[BITS] = {};
#pragma unroll
  for (int i = 0; i < kStream; ++i) {
    const uint32_t code = (bytes[i / 4] >> (8 * (i % 4))) & ((1u << BITS) - 1);
    const int word = BITS * i / 32, shift = BITS * i % 32;
    packed[word] |= code << shift;
    if (shift + BITS > 32) packed[word + 1] |= code >> (32 - shift);
  }
#pragma unroll
  for (int w = 0; w < BITS; ++w) {
    words[(stream * BITS + w) * n + output] = static_cast<int32_t>(packed[w]);
  }
}

__device__ void store(float* to, float value) { *to = value; }
__device__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

template <typename T>
__global__ void dequantize_codes_kernel(Solved codes, T* weight) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= codes.k) return;
  const int64_t n = blockIdx.y;
  const int64_t at = n * codes.groups + codes.g_idx[i];
  const int32_t code = codes.codes[n * codes.k + i] - codes.zeros[at];
  store(weight + n * codes.k + i, static_cast<float>(code) * codes.scales[at]);
}

template <typename T>
const char* dequantize(const Solved& codes, void* weight, void* stream) {
  const dim3 blocks(static_cast<unsigned>((codes.k + kThreads - 1) / kThreads),
                    static_cast<unsigned>(codes.n));
  dequantize_codes_kernel<T>
      <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(codes, static_cast<T*>(weight));
  return outcome(cudaGetLastError());
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_pack_codes(
    const uint8_t* codes, int64_t n, int64_t k, int32_t bits, int32_t* words, void* stream) {
  if (n == 0 || k == 0) return nullptr;
  const dim3 blocks(static_cast<unsigned>((n + kThreads - 1) / kThreads),
                    static_cast<unsigned>(k / kStream));
  const auto kernel = bits == 2   ? pack_codes_kernel<2>
                      : bits == 3 ? pack_codes_kernel<3>
                      : bits == 4 ? pack_codes_kernel<4>
                                  : pack_codes_kernel<8>;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(codes, n, k, words);
  return outcome(cudaGetLastError());
}

const char* auto_gptq_cuda_dequantize_codes(const Solved* codes,
                                            void* weight,
                                            DataType type,
                                            void* stream) {
  if (codes->n == 0 || codes->k == 0) return nullptr;
  if (type == kFloat16) return dequantize<__half>(*codes, weight, stream);
  if (type == kBFloat16) return dequantize<__nv_bfloat16>(*codes, weight, stream);
  return dequantize<float>(*codes, weight, stream);
}
