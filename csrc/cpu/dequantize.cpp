// Packed words to rows of the dense weight.
//
// Codes are packed along K and a row of the weight runs along K, so each column of words unfolds
// into a piece of one row: 32 contiguous weights per stream, no transposition needed.
#include <vector>

#include "../packed.h"

namespace auto_gptq {
namespace {

AUTO_GPTQ_INLINE Halves narrow_to_bfloat16(Floats<8> value) {
  const Words<8> bits = (Words<8>)value;
  const Words<8> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words<8> quiet = (bits >> 16) | 0x40;  // rounding up could turn a NaN into infinity
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded, Halves);
}

AUTO_GPTQ_INLINE Halves narrow_to_float16(Floats<8> value) {
  const Words<8> bits = (Words<8>)value;
  const Words<8> magnitude = bits & 0x7fffffff;
  // Adding 1/2 moves a value below 2^-14 to where the last place of a float is the unit of a
  // subnormal half, so the addition does the rounding.
  const Words<8> half = Words<8>{} + (126u << 23);
  const Words<8> subnormal = (Words<8>)((Floats<8>)magnitude + (Floats<8>)half) - half;
  const Words<8> normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  Words<8> result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? Words<8>{} + 0x7c00 : result;  // from 65520 on: infinity
  result = magnitude > 0x7f800000 ? Words<8>{} + 0x7e00 : result;
  return __builtin_convertvector(result | (bits >> 16 & 0x8000), Halves);
}

template <DataType TYPE>
AUTO_GPTQ_INLINE void write(void* row, int64_t k, Floats<8> value) {
  if constexpr (TYPE == kFloat32) {
    store(static_cast<float*>(row) + k, value);
  } else if constexpr (TYPE == kFloat16) {
    store(static_cast<uint16_t*>(row) + k, narrow_to_float16(value));
  } else {
    store(static_cast<uint16_t*>(row) + k, narrow_to_bfloat16(value));
  }
}

template <int BITS, DataType TYPE>
AUTO_GPTQ_INLINE void dequantize(const Packed& packed,
                                 int64_t n_begin,
                                 int64_t n_end,
                                 char* weight) {
  const int64_t row_bytes = packed.k * (TYPE == kFloat32 ? 4 : 2);
  std::vector<float> grid(2 * kStream * packed.groups);
  for (int64_t n = n_begin; n < n_end; n += kStream) {
    read_grids<BITS>(packed, n, grid.data());
    for (int64_t s = 0; s < packed.k / kStream; ++s) {
      const int32_t* from = packed.qweight + s * BITS * packed.n + n;
      const int32_t* g_idx = packed.g_idx + s * kStream;
      const bool mixed = packed.stream_group[s] < 0;
      for (int c = 0; c < kStream; ++c) {
        uint32_t words[BITS];
#pragma GCC unroll 8
        for (int i = 0; i < BITS; ++i) {
          words[i] = static_cast<uint32_t>(from[i * packed.n + c]);
        }
        const float* column = grid.data() + c;
        const float* shared = column + 2 * kStream * (mixed ? 0 : packed.stream_group[s]);
        Floats<8> zero = Floats<8>{} + shared[0];
        Floats<8> scale = Floats<8>{} + shared[kStream];
#pragma GCC unroll 4
        for (int part = 0; part < kStream / 8; ++part) {
          if (mixed) {
            for (int i = 0; i < 8; ++i) {
              const float* own = column + 2 * kStream * g_idx[8 * part + i];
              zero[i] = own[0];
              scale[i] = own[kStream];
            }
          }
          const Ints<8> codes = read_along<BITS>(words, part);
          write<TYPE>(weight + (n - n_begin + c) * row_bytes, s * kStream + 8 * part,
                      (__builtin_convertvector(codes, Floats<8>) - zero) * scale);
        }
      }
    }
  }
}

template <int BITS, DataType TYPE>
void run_portable(const Packed& packed, int64_t n_begin, int64_t n_end, char* weight) {
  dequantize<BITS, TYPE>(packed, n_begin, n_end, weight);
}

#ifdef __x86_64__
// Rows are written 8 weights at a time and stores are the limit, so AVX-512 takes this path too.
template <int BITS, DataType TYPE>
__attribute__((target("avx2,fma"))) void run_avx2(const Packed& packed,
                                                  int64_t n_begin,
                                                  int64_t n_end,
                                                  char* weight) {
  dequantize<BITS, TYPE>(packed, n_begin, n_end, weight);
}
#endif

template <int BITS, DataType TYPE>
void run(Isa isa, const Packed& packed, int64_t n_begin, int64_t n_end, char* weight) {
#ifdef __x86_64__
  if (isa >= kAvx2) return run_avx2<BITS, TYPE>(packed, n_begin, n_end, weight);
#endif
  run_portable<BITS, TYPE>(packed, n_begin, n_end, weight);
}

template <int BITS>
void run_type(
    Isa isa, DataType type, const Packed& packed, int64_t n_begin, int64_t n_end, char* weight) {
  switch (type) {
    case kFloat32:
      return run<BITS, kFloat32>(isa, packed, n_begin, n_end, weight);
    case kFloat16:
      return run<BITS, kFloat16>(isa, packed, n_begin, n_end, weight);
    case kBFloat16:
      return run<BITS, kBFloat16>(isa, packed, n_begin, n_end, weight);
  }
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

Isa auto_gptq_cpu_best_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? kAvx512Vnni : kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return kAvx2;
  }
#endif
  return kPortable;
}

int64_t auto_gptq_cpu_classify_streams(const int32_t* g_idx,
                                       int64_t k,
                                       int64_t groups,
                                       int32_t* stream_group) {
  for (int64_t s = 0; s < k / kStream; ++s) {
    const int32_t* group = g_idx + s * kStream;
    uint32_t highest = 0;  // a negative index is a huge one
    uint32_t differ = 0;
    for (int i = 0; i < kStream; ++i) {
      const uint32_t g = static_cast<uint32_t>(group[i]);
      highest = g > highest ? g : highest;
      differ |= g ^ static_cast<uint32_t>(group[0]);
    }
    if (highest >= static_cast<uint64_t>(groups)) {
      int64_t i = 0;
      while (group[i] >= 0 && group[i] < groups) {
        ++i;
      }
      return s * kStream + i;
    }
    stream_group[s] = differ ? -1 : group[0];
  }
  return -1;
}

void auto_gptq_cpu_dequantize(
    const Packed* packed, int64_t n_begin, int64_t n_end, void* weight, DataType type, Isa isa) {
  char* rows = static_cast<char*>(weight);
  switch (packed->bits) {
    case 2:
      return run_type<2>(isa, type, *packed, n_begin, n_end, rows);
    case 3:
      return run_type<3>(isa, type, *packed, n_begin, n_end, rows);
    case 4:
      return run_type<4>(isa, type, *packed, n_begin, n_end, rows);
    case 8:
      return run_type<8>(isa, type, *packed, n_begin, n_end, rows);
  }
}
