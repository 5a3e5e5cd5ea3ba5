// Vectors of an instruction set, for any length.
//
// A file tiles_*.cpp includes this under the target of one instruction set and gives a struct Set:
//
//   lanes                      32-bit words in a vector
//   rows_at_once               rows of x that share codes in registers, where there are many
//   takes_bytes                whether multiply_eight multiplies whole bytes, or their high halves
//   multiply_eight(c, x, d, s) add eight words of 4-bit tiles times rows of x, d bytes apart, to s
//   dot<KIND>(c, h, l)         word by word, the sum of four products of bytes, over all vectors, of
//                              unsigned codes and signed numbers 128 h + l; without l: of h
//   dot_all<KIND>(c, x)        the sum over eight vectors c, each times one word of x
//   repeat_shifts(s)           eight numbers, as often as they fit
//   repeat_eight(w, p)         part p of eight words, and the same shifted by four bits
//   double_four(w)             each of four words twice, side by side, as often as they fit
//   add_lanes(v, sums)         the sum of the lanes of each of 16 vectors
//   keep(x)                    x, in a register from here on
//   widen_bytes, widen_halves  bytes to words, float16 to float; widen_half: eight of them
//
// All of it is in an unnamed namespace, as each of those files needs its own code.
//
// x is whole numbers times a scale: one TERM of a byte, or two, 128 h + l.
#pragma once

#include "tiles_unfold.h"

namespace auto_gptq {
namespace {

// What the largest code is: 15, or 255 while every other byte of x is 0, or 255.
enum Kind { kNibbles, kSparse, kBytes };

template <class Set>
using VW = Words<Set::lanes>;
template <class Set>
using VI = Ints<Set::lanes>;
template <class Set>
using VF = Floats<Set::lanes>;
template <class Set>
constexpr int kParts = 16 / Set::lanes;

// Scales as numbers, of 16 bits.
template <class Set, class Halves>
AUTO_GPTQ_INLINE VF<Set> widen_scales(DataType type, Halves halves) {
  return type == kFloat16 ? Set::widen_halves(halves)
                          : (VF<Set>)(__builtin_convertvector(halves, VW<Set>) << 16);
}

// Call a function for all rows of x: for four at a time, as MOST allows, then for two, then for one.
template <int MOST, class Multiply>
AUTO_GPTQ_INLINE void by_rows(int64_t rows, Multiply multiply) {
  int64_t m = 0;
  for (; MOST == 4 && m + 4 <= rows; m += 4) {
    multiply(std::integral_constant<int, 4>{}, m);
  }
  for (; m + 2 <= rows; m += 2) {
    multiply(std::integral_constant<int, 2>{}, m);
  }
  if (m < rows) {
    multiply(std::integral_constant<int, 1>{}, m);
  }
}

}  // namespace
}  // namespace auto_gptq
