// How a product of many rows is parted between blocks, and which way to do so is the fastest.
//
// A result is some outputs for some rows of x, and computing it takes stages of 64 inputs.  A pair
// of blocks computes results by turns, each block half of the outputs.  If what is left for the
// last turn would leave half of the pairs idle, it is dealt out: a pair computes half a result, each
// block half of the stages, and then they add their sums up.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define AUTO_GPTQ_ANYWHERE __host__ __device__ __forceinline__
#else
#define AUTO_GPTQ_ANYWHERE inline
#endif

namespace auto_gptq::wide {

constexpr int kInputs = 64;  // of a stage

struct Work {
  int rows, columns;  // of x, of a result; outputs of a block
  int m_blocks, n_blocks, stages;
  int whole;  // results that one pair computes
  int dealt;  // the results after them, each of which two pairs compute
  int pairs;
};

// What a block computes in one go.
struct Part {
  int m, n;        // the first row of x and the first output
  int begin, end;  // stages
  bool joined;     // with those of the other block of the pair
};

// The part of a block in a turn; false: none, nor in any later turn.
AUTO_GPTQ_ANYWHERE bool part_of(const Work& work, int block, int turn, Part& part) {
  const int pair = block / 2, rank = block % 2, before = turn * work.pairs;
  int result = before + pair;
  const bool joined = result >= work.whole;
  if (joined) {
    const int place = result - work.whole;
    if (place >= work.pairs || place >= 2 * work.dealt) {
      return false;
    }
    result = work.whole + place / 2;
    const int begin = work.stages * rank / 2, end = work.stages * (rank + 1) / 2;
    part = {0, place % 2 * work.columns, begin, end, true};
  } else {
    part = {0, rank * work.columns, 0, work.stages, false};
  }
  // Pairs that run together share rows of x and tiles: four in a row have the same outputs.
  const int band = result / (4 * work.n_blocks), inside = result % (4 * work.n_blocks);
  const int left = work.m_blocks - band * 4, height = left < 4 ? left : 4;
  part.m += (band * 4 + inside % height) * work.rows;
  part.n += inside / height * 2 * work.columns;
  return true;
}

// What a stage costs, in nanoseconds, measured on an H100 at work everywhere.
constexpr struct {
  int rows, columns, stage;
} kCosts[] = {{128, 128, 436}, {192, 128, 560}, {256, 128, 700}, {128, 192, 624}};
constexpr int kTurn = 1000;  // to store results
constexpr int kJoin = 22;    // to add up two blocks' sums, for each row of a result

// With 8 bits results of more than 128 rows took half as long again as others of the same size.
inline Work choose(int64_t m, int64_t n, int64_t k, int bits, int multiprocessors) {
  const int pairs = std::max(multiprocessors / 2, 1);
  Work best = {};
  int64_t least = INT64_MAX;
  for (const auto& cost : kCosts) {
    if (bits == 8 && cost.rows > 128) continue;
    const auto m_blocks = static_cast<int>((m + cost.rows - 1) / cost.rows);
    const auto n_blocks = static_cast<int>((n + 2 * cost.columns - 1) / (2 * cost.columns));
    const auto stages = static_cast<int>((k + kInputs - 1) / kInputs);
    const int results = m_blocks * n_blocks, turns = results / pairs, rest = results % pairs;
    const int dealt = 2 * rest <= pairs && stages > 1 ? rest : 0;
    const int64_t whole = int64_t{stages} * cost.stage + kTurn;
    const int64_t time = turns * whole + (dealt      ? whole / 2 + kJoin * cost.rows
                                          : rest > 0 ? whole
                                                     : 0);
    if (time < least) {
      least = time;
      best = {cost.rows, cost.columns,    m_blocks, n_blocks,
              stages,    results - dealt, dealt,    std::min(pairs, results + dealt)};
    }
  }
  return best;
}

}  // namespace auto_gptq::wide
