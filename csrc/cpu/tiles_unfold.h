// Scales and zeros of a row tile, and its codes unfolded to bytes, in the order for many rows of x.
//
// In an unnamed namespace: it is compiled for every instruction set.
#pragma once

#include "tiles_order.h"

namespace auto_gptq {
namespace {

// Scales and zeros of one group for a row tile.
struct Grid {
  float scale[kRows];
  float zero[kRows];
};

template <class Set>
AUTO_GPTQ_INLINE void read_grid(const Tiled& w, int64_t group, int64_t n, Grid& grid) {
  const int64_t at = group * kSide * tiles_of(w.n) + n;
#pragma GCC unroll 2
  for (int i = 0; i < kRows; i += 8) {
    Floats<8> scale;
    if (w.scale_type == kFloat32) {
      scale = load<Floats<8>>(static_cast<const float*>(w.scales) + at + i);
    } else {
      const Halves halves = load<Halves>(static_cast<const uint16_t*>(w.scales) + at + i);
      scale = w.scale_type == kFloat16 ? Set::widen_half(halves) : widen_bfloat16(halves);
    }
    store(grid.scale + i, scale);
    Floats<8> zero = Floats<8>{} + static_cast<float>(1 << (w.bits - 1));
    if (w.zeros != nullptr) {
      typedef uint8_t Bytes __attribute__((vector_size(8)));
      const Ints<8> codes = __builtin_convertvector(load<Bytes>(w.zeros + at + i), Ints<8>);
      zero = __builtin_convertvector(codes, Floats<8>);
    }
    store(grid.zero + i, zero);
  }
}

// Turn eight rows of eight words into eight columns.
AUTO_GPTQ_INLINE void transpose(Words<8> (&rows)[8]) {
  Words<8> pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Words<8> a = pairs[i + j], b = pairs[i + j + 2];
      fours[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Word `first` + c of all eight lines, in words[c]; lines lie `stride` words apart.
AUTO_GPTQ_INLINE void read_across_lines(const uint32_t* first, int stride, Words<8> (&words)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    words[i] = load<Words<8>>(first + i * stride);
  }
  transpose(words);
}

// Unfold a row tile's part of one tile into [16 words of four inputs][16 outputs].
template <int BITS>
void unfold(const uint32_t* tile, int row_tile, uint32_t* to) {
  const auto put = [&](int word, Words<8> r0, Words<8> r1) {
    store(to + word * kRows, r0);
    store(to + word * kRows + 8, r1);
  };
  Words<8> words[8], more[8];
  if constexpr (BITS == 4) {
    const uint32_t* from = tile + row_tile / 2 * 256 + row_tile % 2 * 8;
#pragma GCC unroll 4
    for (int word = 0; word < 16; ++word) {
      const Words<8> both = load<Words<8>>(from + word * 16);
      put(word, both & 0x0f0f0f0f, both >> 4 & 0x0f0f0f0f);
    }
  } else if constexpr (BITS == 8) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {  // half of the steps, pair of q's
      const int half = part / 2, pair = part % 2;
      read_across_lines(tile + row_tile * 256 + half * 128 + 8 * pair, 16, words);
#pragma GCC unroll 4
      for (int c = 0; c < 8; c += 2) {
        const Words<8> a = words[c], b = words[c + 1];  // i = 0 and 1, i = 2 and 3
        const int q = 2 * pair + c / 4, step = 2 * half + c / 2 % 2;
        put(step * 4 + q, (a & 0x00ff00ff) | (b & 0x00ff00ff) << 8,
            (a >> 8 & 0x00ff00ff) | (b & 0xff00ff00));
      }
    }
  } else {
    read_across_lines(tile + row_tile * 64, 8, words);  // c = 2 q + w
    if constexpr (BITS == 3) {
      uint32_t padded[8][8] = {};
      for (int i = 0; i < 8; ++i) {
        std::memcpy(padded[i], tile + 256 + row_tile * 32 + i * 4, 16);
      }
      read_across_lines(padded[0], 8, more);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      const int half = c / 8, q = c % 8 / 2, w = c % 2;
      const Words<8> low = words[c % 8] >> 4 * half;
      Words<8> r[2] = {low & 0x03030303, low >> 2 & 0x03030303};
      if constexpr (BITS == 3) {
#pragma GCC unroll 2
        for (int output = 0; output < 2; ++output) {
          const int bit = (2 + 2 * output + 4 * half + 8 * w) % 16;
          const Words<8> high = bit ? more[q] >> ((bit - 2) & 31) : more[q] << 2;
          r[output] |= (high & 0x00040004) | (high & 0x00080008) << 7;
        }
      }
      put((w * 2 + half) * 4 + q, r[0], r[1]);
    }
  }
}

// The same for outputs n .. n + 15 and tile t of the inputs.
inline void unfold(const Tiled& w, int64_t n, int64_t t, uint32_t* to) {
  const uint32_t* tile = w.tiles + (n / kSide * tiles_of(w.k) + t) * 128 * w.bits;
  const int row_tile = static_cast<int>(n % kSide / kRows);
  if (w.bits == 2) return unfold<2>(tile, row_tile, to);
  if (w.bits == 3) return unfold<3>(tile, row_tile, to);
  if (w.bits == 4) return unfold<4>(tile, row_tile, to);
  if (w.bits == 8) return unfold<8>(tile, row_tile, to);
}

}  // namespace
}  // namespace auto_gptq
