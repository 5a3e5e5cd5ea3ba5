// Rotary embeddings of whole sequences (../decode.h).
#include "decode.cuh"

namespace auto_gptq {
namespace {

constexpr int kRotateThreads = 256;

// One block per token, whose heads share angles; a thread turns a vector of the low half of a head's
// channels and its partner in the high half.
template <typename T>
__global__ void __launch_bounds__(kRotateThreads) rotate_kernel(Rotate task) {
  start_next();
  wait_for_previous();
  const int64_t row = blockIdx.x / task.tokens, token = blockIdx.x % task.tokens;
  const int64_t half = task.channels / 2;
  const int vectors = static_cast<int>(half / kVector);
  const int64_t angle = row * task.angle_stride + token * task.channels;
  const T* cosine = static_cast<const T*>(task.cosine) + angle;
  const T* sine = static_cast<const T*>(task.sine) + angle;
  const T* x = static_cast<const T*>(task.x) + row * task.x_strides[0] + token * task.x_strides[2];
  T* out = static_cast<T*>(task.out) + row * task.out_strides[0] + token * task.out_strides[2];
  for (int i = threadIdx.x; i < task.heads * vectors; i += kRotateThreads) {
    const int64_t head = i / vectors, c = i % vectors * kVector;
    Vector<T> low, high, cosine_low, cosine_high, sine_low, sine_high;
    low.load(x + head * task.x_strides[1] + c);
    high.load(x + head * task.x_strides[1] + half + c);
    cosine_low.load(cosine + c);
    cosine_high.load(cosine + half + c);
    sine_low.load(sine + c);
    sine_high.load(sine + half + c);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float a = as_float(low.at[e]), b = as_float(high.at[e]);
      low.at[e] = rounded<T>(a * as_float(cosine_low.at[e]) - b * as_float(sine_low.at[e]));
      high.at[e] = rounded<T>(b * as_float(cosine_high.at[e]) + a * as_float(sine_high.at[e]));
    }
    low.store(out + head * task.out_strides[1] + c);
    high.store(out + head * task.out_strides[1] + half + c);
  }
}

template <typename T>
const char* rotate(const Rotate& task, void* stream) {
  const dim3 blocks(static_cast<unsigned>(task.rows * task.tokens));
  return launch(rotate_kernel<T>, blocks, kRotateThreads, task, stream);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

const char* auto_gptq_cuda_rotate(const Rotate* task, void* stream) {
  if (task->rows * task->tokens * task->heads == 0) return nullptr;
  if (task->type == kFloat16) return rotate<__half>(*task, stream);
  if (task->type == kBFloat16) return rotate<__nv_bfloat16>(*task, stream);
  return rotate<float>(*task, stream);
}
