// y = x W^T + bias for few rows of x, straight from the packed words.
//
// With few rows each weight is used little, so the work is turning words into floats.
// For a run of streams of one group,  y += scale * (sum code * x - zero * sum x):  the scale and
// the zero are touched once per run and the inner loop is a mask, a conversion and ROWS fused
// multiply-adds for LANES codes at a time.
#include <algorithm>
#include <utility>
#include <vector>

#include "../packed.h"

namespace auto_gptq {
namespace {

// A tile's rows of words are 2 KB: long enough for the hardware to prefetch.  A run is cut at 128
// codes so that, with one group for all of K, the words of a block still lie on few pages.
constexpr int64_t kTile = 512;
constexpr int64_t kRun = 4;

using Codes = std::make_integer_sequence<int, kStream>;

struct Problem {
  const Packed& packed;
  const float* x;       // [M, K]
  const float* scaled;  // [M, K]
  const float* sums;    // [M, K / 32]
  int64_t m;
  float* y;  // [M, N]
};

// Registers for ROWS rows: the accumulators, the words and the converted codes have to fit.
template <int LANES, int ROWS>
struct Shape {
  static constexpr int vectors = LANES == 8 && ROWS == 1 ? 4 : 2;
  static constexpr int chains = ROWS == 1 ? 2 : 1;  // independent sums hide the latency of the add
  static constexpr int columns = LANES * vectors;
};

template <int BITS, int LANES, int ROWS, int I>
AUTO_GPTQ_INLINE void add_code(
    const int32_t* words,
    int64_t n,
    const float* scaled,
    int64_t k,
    Floats<LANES> (&sum)[Shape<LANES, ROWS>::chains][ROWS][Shape<LANES, ROWS>::vectors]) {
  using S = Shape<LANES, ROWS>;
#pragma GCC unroll 4
  for (int v = 0; v < S::vectors; ++v) {
    const Floats<LANES> code = read_across<BITS, I, LANES>(words + v * LANES, n);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      sum[I % S::chains][row][v] += code * scaled[row * k + I];
    }
  }
}

// Add streams [first, last), all of one group, to the block of 32 columns from n in ROWS rows of y.
template <int BITS, int LANES, int ROWS, int... I>
AUTO_GPTQ_INLINE void add_run(const Problem& p,
                              int64_t row,
                              int64_t first,
                              int64_t last,
                              int64_t n,
                              const float* zero,   // [32]
                              const float* scale,  // [32]
                              std::integer_sequence<int, I...>) {
  using S = Shape<LANES, ROWS>;
  using V = Floats<LANES>;
  const int64_t width = p.packed.n, k = p.packed.k, streams = k / kStream;
  float total[ROWS] = {};
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t s = first; s < last; ++s) {
      total[r] += p.sums[(row + r) * streams + s];
    }
  }
  for (int64_t c = 0; c < kStream; c += S::columns) {
    V sum[S::chains][ROWS][S::vectors] = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < S::vectors; ++v) {
        sum[0][r][v] = load<V>(zero + c + v * LANES) * -total[r];
      }
    }
    for (int64_t s = first; s < last; ++s) {
      const int32_t* words = p.packed.qweight + s * BITS * width + n + c;
      const float* scaled = p.scaled + row * k + s * kStream;
      (add_code<BITS, LANES, ROWS, I>(words, width, scaled, k, sum), ...);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      float* y = p.y + (row + r) * width + n + c;
#pragma GCC unroll 4
      for (int v = 0; v < S::vectors; ++v) {
        V part = sum[0][r][v];
        if constexpr (S::chains == 2) {
          part += sum[1][r][v];
        }
        store(y + v * LANES, load<V>(y + v * LANES) + load<V>(scale + c + v * LANES) * part);
      }
    }
  }
}

// One code whose group is its own: act-order scatters groups over K.
template <int BITS, int LANES, int ROWS, int I>
AUTO_GPTQ_INLINE void add_own_group(const int32_t* words,
                                    int64_t n,
                                    const float* x,
                                    int64_t k,
                                    const int32_t* g_idx,
                                    const float* grid,
                                    Floats<LANES> (&sum)[ROWS][Shape<LANES, ROWS>::vectors]) {
  const float* zero = grid + 2 * kStream * g_idx[I];
#pragma GCC unroll 4
  for (int v = 0; v < Shape<LANES, ROWS>::vectors; ++v) {
    const Floats<LANES> code =
        read_across<BITS, I, LANES>(words + v * LANES, n) * place_factor(BITS, I);
    const Floats<LANES> weight = (code - load<Floats<LANES>>(zero + v * LANES)) *
                                 load<Floats<LANES>>(zero + kStream + v * LANES);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      sum[row][v] += weight * x[row * k + I];
    }
  }
}

// Add streams [first, last) where they mix groups, to LANES * vectors columns of ROWS rows of y.
template <int BITS, int LANES, int ROWS, int... I>
AUTO_GPTQ_INLINE void add_mixed_run(const Problem& p,
                                    int64_t row,
                                    int64_t first,
                                    int64_t last,
                                    int64_t n,
                                    const float* grid,
                                    std::integer_sequence<int, I...>) {
  using S = Shape<LANES, ROWS>;
  using V = Floats<LANES>;
  const int64_t width = p.packed.n, k = p.packed.k;
  V sum[ROWS][S::vectors] = {};
  for (int64_t s = first; s < last; ++s) {
    if (p.packed.stream_group[s] >= 0) {
      continue;
    }
    const int32_t* words = p.packed.qweight + s * BITS * width + n;
    // A narrow path down the matrix meets a new page at every row, where the hardware does not
    // prefetch (2 to 4 times slower).  16 words are a cache line; past the end nothing happens.
    for (int i = 0; i < BITS; ++i) {
      for (int c = 0; c < S::columns; c += 16) {
        __builtin_prefetch(words + (kRun * BITS + i) * width + c);
      }
    }
    const float* x = p.x + row * k + s * kStream;
    const int32_t* g_idx = p.packed.g_idx + s * kStream;
    (add_own_group<BITS, LANES, ROWS, I>(words, width, x, k, g_idx, grid, sum), ...);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    float* y = p.y + (row + r) * width + n;
#pragma GCC unroll 4
    for (int v = 0; v < S::vectors; ++v) {
      store(y + v * LANES, load<V>(y + v * LANES) + sum[r][v]);
    }
  }
}

// Add all mixed streams to a block, a run at a time: one sum over all of K rounds 8 times as much.
template <int BITS, int LANES, int ROWS>
AUTO_GPTQ_INLINE void add_mixed(const Problem& p, int64_t row, int64_t n, const float* grid) {
  const int64_t streams = p.packed.k / kStream;
  for (int64_t c = 0; c < kStream; c += Shape<LANES, ROWS>::columns) {
    for (int64_t s = 0; s < streams; s += kRun) {
      add_mixed_run<BITS, LANES, ROWS>(p, row, s, std::min(s + kRun, streams), n + c, grid + c,
                                       Codes{});
    }
  }
}

template <int BITS, int LANES>
AUTO_GPTQ_INLINE void add_runs(const Problem& p, int64_t n_begin, int64_t n_end) {
  const int32_t* group = p.packed.stream_group;
  const int64_t streams = p.packed.k / kStream;
  for (int64_t first = 0, last; first < streams; first = last) {
    last = first + 1;
    if (group[first] < 0) {
      continue;
    }
    while (last < streams && last - first < kRun && group[last] == group[first]) {
      ++last;
    }
    for (int64_t n = n_begin; n < n_end; n += kStream) {
      float zero[kStream], scale[kStream];
      read_grid<BITS>(p.packed, group[first], n, zero, scale);
      int64_t row = 0;
      for (; row + 4 <= p.m; row += 4) {
        add_run<BITS, LANES, 4>(p, row, first, last, n, zero, scale, Codes{});
      }
      for (; row < p.m; ++row) {
        add_run<BITS, LANES, 1>(p, row, first, last, n, zero, scale, Codes{});
      }
    }
  }
}

template <int BITS, int LANES>
AUTO_GPTQ_INLINE void add_mixed_streams(const Problem& p, int64_t n_begin, int64_t n_end) {
  std::vector<float> grid(2 * kStream * p.packed.groups);
  for (int64_t n = n_begin; n < n_end; n += kStream) {
    read_grids<BITS>(p.packed, n, grid.data());
    int64_t row = 0;
    for (; row + 4 <= p.m; row += 4) {
      add_mixed<BITS, LANES, 4>(p, row, n, grid.data());
    }
    for (; row < p.m; ++row) {
      add_mixed<BITS, LANES, 1>(p, row, n, grid.data());
    }
  }
}

template <int BITS, int LANES>
AUTO_GPTQ_INLINE void add_products(const Problem& p, int64_t n_begin, int64_t n_end) {
  for (int64_t n = n_begin; n < n_end; n += kTile) {
    add_runs<BITS, LANES>(p, n, std::min(n + kTile, n_end));
  }
  const int32_t* group = p.packed.stream_group;
  if (std::find(group, group + p.packed.k / kStream, -1) != group + p.packed.k / kStream) {
    add_mixed_streams<BITS, LANES>(p, n_begin, n_end);
  }
}

#ifdef __x86_64__
template <int BITS>
__attribute__((target("avx2,fma"))) void run_avx2(const Problem& p,
                                                  int64_t n_begin,
                                                  int64_t n_end) {
  add_products<BITS, 8>(p, n_begin, n_end);
}

template <int BITS>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void run_avx512(const Problem& p,
                                                                                  int64_t n_begin,
                                                                                  int64_t n_end) {
  add_products<BITS, 16>(p, n_begin, n_end);
}
#endif

template <int BITS>
void run(Isa isa, const Problem& p, int64_t n_begin, int64_t n_end) {
#ifdef __x86_64__
  if (isa >= kAvx512) return run_avx512<BITS>(p, n_begin, n_end);
  if (isa == kAvx2) return run_avx2<BITS>(p, n_begin, n_end);
#endif
  add_products<BITS, 4>(p, n_begin, n_end);
}

}  // namespace
}  // namespace auto_gptq

using namespace auto_gptq;

void auto_gptq_cpu_prepare_activations(
    const float* x, int64_t m, int64_t k, int32_t bits, float* scaled, float* sums) {
  float factor[kStream];
  for (int i = 0; i < kStream; ++i) {
    factor[i] = place_factor(bits, i);
  }
  for (int64_t s = 0; s < m * k / kStream; ++s) {
    Floats<8> sum = {};
    for (int i = 0; i < kStream; i += 8) {
      const Floats<8> part = load<Floats<8>>(x + s * kStream + i);
      store(scaled + s * kStream + i, part * load<Floats<8>>(factor + i));
      sum += part;
    }
    sums[s] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
}

void auto_gptq_cpu_q_linear(const Packed* packed,
                            const float* x,
                            const float* scaled,
                            const float* sums,
                            int64_t m,
                            const float* bias,
                            float* y,
                            int64_t n_begin,
                            int64_t n_end,
                            Isa isa) {
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t n = n_begin; n < n_end; ++n) {
      y[row * packed->n + n] = bias ? bias[n] : 0.0f;
    }
  }
  const Problem problem{*packed, x, scaled, sums, m, y};
  if (packed->bits == 2) return run<2>(isa, problem, n_begin, n_end);
  if (packed->bits == 3) return run<3>(isa, problem, n_begin, n_end);
  if (packed->bits == 4) return run<4>(isa, problem, n_begin, n_end);
  if (packed->bits == 8) return run<8>(isa, problem, n_begin, n_end);
}
