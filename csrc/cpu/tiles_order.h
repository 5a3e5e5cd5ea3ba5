// x in whole numbers, in the order in which products with tiles take it.
//
// Codes stay where they are; x, which is small, is brought to them.  A tile's 64 inputs are named
// by step, q and i as in auto_gptq/formats/tiles.py: input 16 step + 4 q + i below.
#pragma once

#include <algorithm>

#include "../packed.h"

namespace auto_gptq {

constexpr int kSide = 64;           // of a tile
constexpr int kRows = 16;           // outputs of a row tile
constexpr int kRounded = 32;        // inputs of x that share a scale, a half of the steps
constexpr int kShifts = 8;          // of a tile, of few rows of one term
constexpr int kNothing = kSide;     // a place of no input, where x counts as 0
constexpr int kTwoTerms = 16256;    // the largest 128 h + l with h and l in a byte
constexpr int kOneTerm = 127;

constexpr int64_t tiles_of(int64_t size) { return (size + kSide - 1) / kSide; }

// Padding has a group, too; there x is 0.
AUTO_GPTQ_INLINE int64_t group_at(const Tiled& weight, int64_t place) {
  return std::min(place / weight.group_size, weight.groups - 1);
}

// The place in a tile of step, q and i where inputs that share a scale come in runs.
constexpr int place_of(int run, int step, int q, int i) {
  return step / (run / 16) * run + q * run / 4 + step % (run / 16) * 4 + i;
}

// Bytes of x per tile and term.  With 8 bits and few rows a word of codes holds two of output r0
// and two of r1, so each gets an x of its own with zeros in between.
constexpr int bytes_of_x(int bits, bool few) { return few && bits == 8 ? 4 * kSide : kSide; }

struct Order {
  uint8_t input[4 * kSide];  // of each byte of x
};

// For few rows, words are as in the tile: with 2 and 3 bits [i / 2][q][step / 2].  For many rows, and
// with 4 bits for any, steps come one after another: [step][q], with 2 and 3 bits [step / 2][i / 2][q].
constexpr Order order_of(int bits, bool few) {
  Order order{};
  for (int at = 0; at < bytes_of_x(bits, few); ++at) {
    const int byte = at % 4, word = at / 4;
    int step = 0, q = 0, i = 0;
    if (bits < 4) {  // a word holds i = 0 and 1, or 2 and 3, of two steps
      q = few ? word / 2 % 4 : word % 4;
      step = (few ? word % 2 : word / 8) * 2 + byte % 2;
      i = (few ? word / 8 : word / 4 % 2) * 2 + byte / 2;
    } else if (bits == 8 && few) {  // [step / 2][r0 or r1][q][step % 2][i / 2]; bytes r0 r1 r0 r1
      q = word / 4 % 4;
      step = word / 32 * 2 + word / 2 % 2;
      i = word % 2 * 2 + byte / 2;
    } else {
      q = word % 4;
      step = word / 4;
      i = byte % 2 * 2 + byte / 2;  // 0, 2, 1, 3
    }
    const bool others = bits == 8 && few && byte % 2 != word / 16 % 2;
    order.input[at] = others ? kNothing : 16 * step + 4 * q + i;
  }
  return order;
}

}  // namespace auto_gptq
