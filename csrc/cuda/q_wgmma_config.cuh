// What varies between the kernels of q_wgmma.cuh, and scales and zeros, which vary the most.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "q_wgmma.h"
#include "shared.cuh"
#include "store.cuh"
#include "tiles.cuh"

namespace auto_gptq {

// Which grids a kernel understands.
enum class Grids {
  kOwn,    // scales of the type of x, no zeros
  kZeros,  // scales of the type of x, zeros
  kAny,    // scales of any type, zeros or none
};

// Results of a layout, in a type.
template <typename T_, typename L>
struct Results : L {
  using T = T_;
};

// What one kernel multiplies and where it keeps it in shared memory.  SPANS is how many groups the
// 64 inputs of a tile may have: 1, 2 or 4.
template <int BITS_, typename T, Grids GRIDS_, int SPANS, typename L>
struct Config : Results<T, L> {
  using Sum = Results<T, L>;
  static constexpr int kBits = BITS_;
  static constexpr Grids kGrids = GRIDS_;
  static constexpr int kSpans = SPANS;
  static constexpr DataType kType = Pairs<T>::kMantissa == 10 ? kFloat16 : kBFloat16;

  // Either x is brought into the order of the codes, or the codes into that of x, where tensor
  // cores leave no time to move so many rows about.
  static constexpr bool kOrdersX = L::kRows < 128 || BITS_ != 4 || SPANS > 1;

  // Warps that do so: two keep up with 32 rows, and with products of twice as many outputs.
  static constexpr bool kIsWide = L::kTiles == 2;
  static constexpr int kOrderers = !kOrdersX                    ? 0
                                   : kIsWide || L::kRows == 32 ? 2
                                   : L::kRows == 64            ? 4
                                                               : 6;
  static constexpr int kThreads = L::kConsumers + (kOrderers > 2 ? 256 : 128);

  // A multiprocessor has 64 Ki registers: they are given to so many threads at the start, of which
  // some then give what others take.  Where fewer suffice, kernels before and behind fit beside.
  static constexpr int kBound = kThreads + (kOrdersX || kIsWide ? 0 : 64);
  static constexpr int kGive = kIsWide || L::kRows < 128 ? 56 : 88;
  static constexpr int kTake = kIsWide           ? 224
                               : L::kRows == 32 ? 152
                               : L::kRows == 64 ? 120
                               : kOrdersX       ? 168
                                                : 144;

  static constexpr int kX = L::kRows * 128;  // bytes of 64 inputs
  static constexpr int kTile = 512 * kBits;
  static constexpr int kColumn = L::kDepth * kTile;  // tiles of one 64 outputs lie together
  static constexpr int kStage = L::kDepth * kX + L::kColumns / kSide * kColumn;
  static constexpr int kSpan = L::kColumns * (kGrids == Grids::kAny ? 4 : 2);  // bytes of scales
  static constexpr int kZeros = kSpans * kSpan;
  static constexpr int kGrid = kZeros + (kGrids == Grids::kOwn ? 0 : kSpans * L::kColumns);
  static constexpr int kPerStage = kStage + L::kDepth * kGrid;
  static constexpr int kStages = std::min((226 << 10) / kPerStage, 12);
  static constexpr int kGridsAt = kStages * kStage;
  static constexpr int kBarriersAt = kStages * kPerStage;
  static constexpr int kBytes = kBarriersAt + 24 * kStages + 8;
  static_assert(kStage % 1024 == 0 && kStages > 1 && kBytes <= 227 << 10);
};

// A lane's scales and zeros in one tile, for its two outputs.
template <typename C>
struct Grid {
  using T = typename C::T;
  bool is_own, is_wide, has_zeros;
  uint32_t place;  // of a scale in a word
  uint32_t scale[C::kSpans][2], zero[C::kSpans][2];

  __device__ __forceinline__ explicit Grid(const Tiled& weight)
      : is_own(weight.scale_type == C::kType),
        is_wide(weight.scale_type == kFloat32),
        has_zeros(weight.zeros != nullptr),
        place(is_wide ? 0x3210 : threadIdx.x & 4 ? 0x3232 : 0x1010) {}

  // Without branches: between products that run, ptxas cannot have them.
  __device__ __forceinline__ void read(uint32_t scales, uint32_t zeros, int columns) {
#pragma unroll
    for (int i = 0; i < C::kSpans * 2; ++i) {
      const int span = i / 2, row = i % 2, column = columns + row * 8;
      if constexpr (C::kGrids == Grids::kAny) {
        const uint32_t from = (scales & ~3u) + span * C::kSpan;
        scale[span][row] = convert(load_word(from + column * (is_wide ? 4 : 2)));
      } else {
        scale[span][row] = twice(load_half(scales + (span * C::kSpan + column * 2)));
      }
      if constexpr (C::kGrids != Grids::kOwn) {
        const uint32_t byte = load_byte(zeros + span * C::kColumns + column);
        const bool is_there = C::kGrids == Grids::kZeros || has_zeros;
        zero[span][row] = pair_of_zero<C::kBits, T>(is_there ? byte : 1u << (C::kBits - 1));
      }
    }
  }

  // A pair of the scale that lies in a word, alone or beside another.
  __device__ __forceinline__ uint32_t convert(uint32_t word) const {
    const uint32_t own = __byte_perm(word, 0, place);
    const bool is_half = C::kType == kBFloat16 && !is_wide;  // if not own
    const float value = is_half ? __half2float(__ushort_as_half(own))
                                : __uint_as_float(is_wide ? own : own & 0xffff0000u);
    return is_own ? own : pack<T>(value, value);
  }

  __device__ __forceinline__ void numbers(const LaneCodes<C::kBits>& codes,
                                          uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int span = s * C::kSpans / 4;
      decode<C::kBits, T, C::kGrids != Grids::kOwn>(codes, s, a[s], zero[span]);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        a[s][f] = Pairs<T>::fma(a[s][f], scale[span][f % 2], 0);
      }
    }
  }
};

}  // namespace auto_gptq
