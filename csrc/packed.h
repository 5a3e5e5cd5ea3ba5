// Readers of packed words.
//
// Every 32 codes of `bits` bits are `bits` words, read as one little-endian stream of bits in which
// code i starts at bit bits * i.  With 3 bits, codes 10 and 21 continue in the next word.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

// Vector code is written once, as always-inlined templates, and compiled for each instruction set
// by being inlined into functions that carry a target attribute.
#define AUTO_GPTQ_INLINE inline __attribute__((always_inline))

namespace auto_gptq {

constexpr int kStream = 32;  // codes per stream

// Where code i of a stream lies.
struct Field {
  int word;   // index of the word that holds its lowest bit
  int shift;  // position of its lowest bit in that word
  int spill;  // number of its bits that continue in the next word
};

constexpr Field field_of(int bits, int i) {
  const int shift = bits * i % 32;
  return {bits * i / 32, shift, shift + bits > 32 ? shift + bits - 32 : 0};
}

// A masked but unshifted field is code * 2^shift.  That is a signed int32 that converts to float
// without rounding, unless the field reaches the sign bit.  Leaving fields in place saves a shift
// per code: the factor 2^-shift goes into the activation instead, where it costs nothing.
constexpr bool stays_in_place(int bits, int i) { return field_of(bits, i).shift + bits < 32; }

constexpr float place_factor(int bits, int i) {
  return stays_in_place(bits, i) ? 1.0f / (1u << field_of(bits, i).shift) : 1.0f;
}

template <typename T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <int LANES>
using Floats = typename VectorOf<float, LANES>::type;
template <int LANES>
using Ints = typename VectorOf<int32_t, LANES>::type;
template <int LANES>
using Words = typename VectorOf<uint32_t, LANES>::type;
using Halves = typename VectorOf<uint16_t, 8>::type;

template <typename V>
AUTO_GPTQ_INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
AUTO_GPTQ_INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// Code I of LANES streams that lie side by side, times 2^shift where the field stays in place.
template <int BITS, int I, int LANES>
AUTO_GPTQ_INLINE Floats<LANES> read_across(
    const int32_t* words,  // first word of the first stream
    int64_t stride) {      // from one word of a stream to its next
  constexpr Field field = field_of(BITS, I);
  constexpr uint32_t mask = (1u << BITS) - 1;
  const int32_t* at = words + field.word * stride;
  Words<LANES> code = load<Words<LANES>>(at);
  if constexpr (stays_in_place(BITS, I)) {
    code &= mask << field.shift;
  } else {
    code >>= field.shift;
    if constexpr (field.spill > 0) {
      code |= load<Words<LANES>>(at + stride) << (BITS - field.spill) & mask;
    }
  }
  return __builtin_convertvector((Ints<LANES>)code, Floats<LANES>);
}

// Codes [8 * part, 8 * part + 8) of one stream whose words are contiguous.
template <int BITS>
AUTO_GPTQ_INLINE Ints<8> read_along(const uint32_t* words, int part) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  if constexpr (BITS == 8) {
    const uint32_t a = words[2 * part], b = words[2 * part + 1];
    const Words<8> pair = {a, a, a, a, b, b, b, b};
    const Words<8> shifts = {0, 8, 16, 24, 0, 8, 16, 24};
    return (Ints<8>)(pair >> shifts & mask);
  } else {
    const int bit = 8 * BITS * part, word = bit / 32, shift = bit % 32;
    uint32_t window = words[word] >> shift;
    if (shift + 8 * BITS > 32) {
      window |= words[word + 1] << (32 - shift);
    }
    const Words<8> lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (Ints<8>)((Words<8>{} + window) >> (lane * BITS) & mask);
  }
}

AUTO_GPTQ_INLINE Floats<8> widen_bfloat16(Halves value) {
  return (Floats<8>)(__builtin_convertvector(value, Words<8>) << 16);
}

AUTO_GPTQ_INLINE Floats<8> widen_float16(Halves value) {
  const Words<8> bits = __builtin_convertvector(value, Words<8>);
  const Words<8> magnitude = (bits & 0x7fff) << 13;
  const Words<8> rebias = Words<8>{} + (112u << 23);
  // A subnormal half is its mantissa counted in units of the last place of 2^-14.
  const Words<8> least = Words<8>{} + (113u << 23);
  const Words<8> subnormal = (Words<8>)((Floats<8>)(magnitude + least) - (Floats<8>)least);
  const Words<8> normal = magnitude + rebias;
  const Words<8> infinite = normal + rebias;
  Words<8> result = magnitude < (1u << 23) ? subnormal : normal;
  result = magnitude >= (31u << 23) ? infinite : result;
  return (Floats<8>)(result | (bits & 0x8000) << 16);
}

// The zeros and scales of one group for the 32 columns that start at n.
template <int BITS>
AUTO_GPTQ_INLINE void read_grid(const Packed& packed,
                                int64_t group,
                                int64_t n,
                                float* zero,     // out [32]
                                float* scale) {  // out [32]
  uint32_t words[BITS];
  std::memcpy(words, packed.qzeros + (group * packed.n + n) / kStream * BITS, sizeof(words));
  const int64_t first = group * packed.n + n;
#pragma GCC unroll 4
  for (int part = 0; part < kStream / 8; ++part) {
    const Ints<8> stored = read_along<BITS>(words, part);
    const Ints<8> zeros = (stored + packed.zero_offset) & ((1 << BITS) - 1);
    store(zero + 8 * part, __builtin_convertvector(zeros, Floats<8>));
    const int64_t at = first + 8 * part;
    Floats<8> scales;
    if (packed.scale_type == kFloat32) {
      scales = load<Floats<8>>(static_cast<const float*>(packed.scales) + at);
    } else {
      const Halves halves = load<Halves>(static_cast<const uint16_t*>(packed.scales) + at);
      scales = packed.scale_type == kFloat16 ? widen_float16(halves) : widen_bfloat16(halves);
    }
    store(scale + 8 * part, scales);
  }
}

// The grids of all groups for the 32 columns that start at n.
template <int BITS>
AUTO_GPTQ_INLINE void read_grids(const Packed& packed,
                                 int64_t n,
                                 float* grid) {  // out [G, 2, 32]: zeros, then scales
  for (int64_t group = 0; group < packed.groups; ++group) {
    float* zero = grid + 2 * kStream * group;
    read_grid<BITS>(packed, group, n, zero, zero + kStream);
  }
}

}  // namespace auto_gptq
