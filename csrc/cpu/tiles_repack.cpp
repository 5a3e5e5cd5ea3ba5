// Into tiles and out of them, and tiles to rows of the dense weight.
#include <cstring>

#include "tiles_unfold.h"

namespace auto_gptq {
namespace {

// Some bits of every code; a lane has as many words of a plane.
struct Plane {
  int bits, first_bit;
  int64_t at;  // the first of its words in a tile
};

// The planes of a tile, see formats/tiles.py.
int planes_of(int bits, Plane (&planes)[2]) {
  planes[0] = {bits == 3 ? 2 : bits, 0, 0};
  planes[1] = {1, 2, 256};
  return bits == 3 ? 2 : 1;
}

// Word and bit of code i of `step`, h being 0 for the output r0 and 1 for r1.
void place_of_code(int bits, int step, int i, int h, int& word, int& bit) {
  const int half = i % 2 * 16, pair = step * 4 + i / 2 * 2 + h;
  if (bits == 1) {
    const int field = pair % 8;
    word = 0;
    bit = half + (2 + field % 4 * 2 + field / 4 + 8 * (pair / 8)) % 16;
  } else {
    word = pair / (16 / bits);
    bit = half + pair % (16 / bits) * bits;
  }
}

// Where the CPU holds a word of a lane with 4 bits, see formats/tiles.py.
int64_t word_of_four(int row_tile, int lane, int step) {
  return row_tile / 2 * 256 + (step * 4 + lane % 4) * 16 + row_tile % 2 * 8 + lane / 4;
}

// Call visit(word of the tile, its bit, the field's first bit and bits, input, output) for each
// piece of each code.
template <typename Visit>
AUTO_GPTQ_INLINE void for_codes(int bits, int run, const Visit& visit) {
  Plane planes[2];
  const int count = planes_of(bits, planes);
  for (int p = 0; p < count; ++p) {
    const Plane plane = planes[p];
    const int vector = std::min(plane.bits, 4);
    for (int step = 0; step < 4; ++step) {
      for (int i = 0; i < 4; ++i) {
        for (int h = 0; h < 2; ++h) {
          int word, bit;
          place_of_code(plane.bits, step, i, h, word, bit);
          for (int row_tile = 0; row_tile < 4; ++row_tile) {
            const int64_t first = plane.at + row_tile * 32 * plane.bits +
                                  word / vector * 32 * vector + word % vector;
            for (int lane = 0; lane < 32; ++lane) {
              const int64_t at =
                  bits == 4 ? word_of_four(row_tile, lane, word) : first + lane * vector;
              visit(at, bit, plane.first_bit, plane.bits,
                    place_of(run, step, lane % 4, i), row_tile * kRows + lane / 4 + 8 * h);
            }
          }
        }
      }
    }
  }
}

// Codes [64 inputs][64 outputs] of one tile.
using Codes = uint8_t[kSide][kSide];

AUTO_GPTQ_INLINE int64_t input_at(const Tiled& w, int64_t place) {
  return w.perm ? w.perm[place] : place;
}

void read_words(const int32_t* qweight, const Tiled& w, int64_t t, int64_t n, Codes& codes) {
  const uint32_t mask = (1u << w.bits) - 1;
  const int64_t width = std::min<int64_t>(kSide, w.n - n);
  std::memset(codes, 0, sizeof(Codes));
  for (int k = 0; k < kSide && t * kSide + k < w.k; ++k) {
    const int64_t input = input_at(w, t * kSide + k);
    const Field field = field_of(w.bits, static_cast<int>(input % kStream));
    const int32_t* words = qweight + (input / kStream * w.bits + field.word) * w.n + n;
    for (int64_t c = 0; c < width; ++c) {
      uint32_t code = static_cast<uint32_t>(words[c]) >> field.shift;
      if (field.spill) {
        code |= static_cast<uint32_t>(words[c + w.n]) << (w.bits - field.spill);
      }
      codes[k][c] = static_cast<uint8_t>(code & mask);
    }
  }
}

void write_words(const Codes& codes, const Tiled& w, int64_t t, int64_t n, int32_t* qweight) {
  const int64_t width = std::min<int64_t>(kSide, w.n - n);
  for (int k = 0; k < kSide && t * kSide + k < w.k; ++k) {
    const int64_t input = input_at(w, t * kSide + k);
    const Field field = field_of(w.bits, static_cast<int>(input % kStream));
    int32_t* words = qweight + (input / kStream * w.bits + field.word) * w.n + n;
    for (int64_t c = 0; c < width; ++c) {
      const uint32_t code = codes[k][c];
      words[c] |= static_cast<int32_t>(code << field.shift);
      if (field.spill) {
        words[c + w.n] |= static_cast<int32_t>(code >> (w.bits - field.spill));
      }
    }
  }
}

struct Portable {
  static Floats<8> widen_half(Halves halves) { return widen_float16(halves); }
};

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

void auto_gptq_cpu_repack_tiles(
    const int32_t* qweight, const Tiled* weight, uint32_t* tiles, int64_t n_begin, int64_t n_end) {
  const int64_t words = 128 * weight->bits, k_tiles = tiles_of(weight->k);
  Codes codes;
  for (int64_t n = n_begin; n < n_end; n += kSide) {
    for (int64_t t = 0; t < k_tiles; ++t) {
      read_words(qweight, *weight, t, n, codes);
      uint32_t* tile = tiles + (n / kSide * k_tiles + t) * words;
      std::memset(tile, 0, words * sizeof(uint32_t));
      for_codes(weight->bits, weight->run,
                [&](int64_t word, int bit, int first, int bits, int input, int output) {
                  const uint32_t field = codes[input][output] >> first & ((1u << bits) - 1);
                  tile[word] |= field << bit;
                });
    }
  }
}

void auto_gptq_cpu_unrepack_tiles(const Tiled* weight,
                                  int32_t* qweight,
                                  int64_t n_begin,
                                  int64_t n_end) {
  const int64_t words = 128 * weight->bits, k_tiles = tiles_of(weight->k);
  Codes codes;
  for (int64_t n = n_begin; n < n_end; n += kSide) {
    const int64_t width = std::min<int64_t>(kSide, weight->n - n);
    for (int64_t row = 0; row < weight->k / kStream * weight->bits; ++row) {
      std::memset(qweight + row * weight->n + n, 0, width * sizeof(int32_t));
    }
    for (int64_t t = 0; t < k_tiles; ++t) {
      const uint32_t* tile = weight->tiles + (n / kSide * k_tiles + t) * words;
      std::memset(codes, 0, sizeof(Codes));
      for_codes(weight->bits, weight->run,
                [&](int64_t word, int bit, int first, int bits, int input, int output) {
                  const uint32_t field = tile[word] >> bit & ((1u << bits) - 1);
                  codes[input][output] |= static_cast<uint8_t>(field << first);
                });
      write_words(codes, *weight, t, n, qweight);
    }
  }
}

void auto_gptq_cpu_dequantize_tiles(const Tiled* weight,
                                    float* dense,
                                    int64_t n_begin,
                                    int64_t n_end) {
  const Tiled& w = *weight;
  const Order order = order_of(w.bits, false);
  uint32_t words[16][kRows];
  Grid grid = {};
  for (int64_t n = n_begin; n < n_end; n += kRows) {
    int64_t group = -1;
    for (int64_t t = 0; t < tiles_of(w.k); ++t) {
      unfold(w, n, t, words[0]);
      uint8_t codes[kSide][kRows];
      for (int at = 0; at < kSide; ++at) {
        const int input = order.input[at];
        uint8_t* to = codes[place_of(w.run, input / 16, input / 4 % 4, input % 4)];
        for (int r = 0; r < kRows; ++r) {
          to[r] = static_cast<uint8_t>(words[at / 4][r] >> at % 4 * 8);
        }
      }
      for (int64_t k = 0; k < kSide && t * kSide + k < w.k; ++k) {
        const int64_t g = group_at(w, t * kSide + k);
        if (g != group) {
          group = g;
          read_grid<Portable>(w, g, n, grid);
        }
        float* column = dense + (n - n_begin) * w.k + input_at(w, t * kSide + k);
        for (int r = 0; r < kRows; ++r) {
          column[r * w.k] = (static_cast<float>(codes[k][r]) - grid.zero[r]) * grid.scale[r];
        }
      }
    }
  }
}
