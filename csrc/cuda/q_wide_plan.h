// How a product of many rows is parted between blocks, and which way to do so is the fastest.
//
// A result is some outputs for some rows of x, and computing it takes stages of 64 inputs.  Pairs of
// blocks compute results, each block half of the outputs: first whole ones by turns.  The stages of
// those left are laid end to end and dealt out to the pairs in equal ranges, each of which ends in
// the head of a result and begins with the tail of another.  The lower of two pairs that share a
// result does the head first and gives its sums to the higher one, which does the tail last and adds
// them.  So no pair waits for one that waits itself before it has given.
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

// A divisor known beforehand: a GPU takes a hundred cycles for others.
struct Divisor {
  int by;
  uint32_t reciprocal;
};

inline Divisor divisor(int by) {
  return {by, UINT32_MAX / static_cast<uint32_t>(by)};
}

// The quotient, of a number that is not negative.
AUTO_GPTQ_ANYWHERE int divide(int number, Divisor divisor, int& rest) {
  // At most one too small.
  int quotient = static_cast<int>(uint64_t{static_cast<uint32_t>(number)} * divisor.reciprocal >> 32);
  rest = number - quotient * divisor.by;
  if (rest >= divisor.by) {
    rest -= divisor.by;
    ++quotient;
  }
  return quotient;
}

struct Work {
  int rows, columns;  // of x, of a result; outputs of a block
  int m_blocks, n_blocks, stages;
  int pairs;
  int turns;   // whole results of every pair
  int group;   // so many of the results after them (or what is left) are dealt out ...
  int more;    // ... to so many more pairs, or fewer
  int lead;    // stages that the first pair of a group gets less, since the next waits for it
  int length;  // stages that a pair gets of them at the most
  Divisor by_stages, by_size, by_band;  // of a result, pairs of a group, results of a band
};

constexpr int kBand = 4;  // so many results in a row have the same outputs

// What follows from the rest.
inline void finish(Work& work) {
  const int size = work.group + work.more;
  work.length = (work.group * work.stages + work.lead + size - 1) / size;
  work.by_stages = divisor(work.stages);
  work.by_size = divisor(size);
  work.by_band = divisor(kBand * work.n_blocks);
}

// What a block computes in one go.
struct Part {
  int m, n;        // the first row of x and the first output
  int begin, end;  // stages
  bool gives;      // its sums to the block two further on,
  bool takes;      // adds those that the block two before gave
};

// The part of a block in a turn; false: none, nor in any later turn.
AUTO_GPTQ_ANYWHERE bool part_of(const Work& work, int block, int turn, Part& part) {
  const int pair = block / 2, rank = block % 2;
  int result = turn * work.pairs + pair, begin = 0, end = work.stages;
  if (turn >= work.turns) {
    int place, unused;
    const int first = work.turns * work.pairs + divide(pair, work.by_size, place) * work.group;
    const int left = work.m_blocks * work.n_blocks - first;
    const int all = (left < work.group ? left : work.group) * work.stages;
    begin = place == 0 ? 0 : place * work.length - work.lead;
    end = (place + 1) * work.length - work.lead;
    end = end < all ? end : all;
    if (begin >= end) {
      return false;
    }
    result = divide(end - 1, work.by_stages, unused) - (turn - work.turns);  // the last comes first
    begin -= result * work.stages;
    end -= result * work.stages;
    begin = begin > 0 ? begin : 0;
    end = end < work.stages ? end : work.stages;
    if (begin >= end) {
      return false;
    }
    result += first;
  }
  // Pairs that run together share rows of x and tiles.
  int inside, row;
  const int above = divide(result, work.by_band, inside) * kBand;
  const int height = work.m_blocks - above < kBand ? work.m_blocks - above : kBand;
  const int column = divide(inside, {height, height == 3 ? UINT32_MAX / 3 : UINT32_MAX / kBand *
                                                 (kBand / height)}, row);
  part.m = (above + row) * work.rows;
  part.n = (2 * column + rank) * work.columns;
  part.begin = begin;
  part.end = end;
  part.gives = end < work.stages;
  part.takes = begin > 0;
  return true;
}

// What a stage costs, in nanoseconds, measured on an H100 at work everywhere.
constexpr struct {
  int rows, columns, stage;
} kCosts[] = {{128, 128, 436}, {192, 128, 560}, {256, 128, 700}, {128, 192, 624}};
constexpr int kTurn = 1000;       // to store results
constexpr int kJoin = 10;         // to give and take sums, for each row of a result
constexpr int kLead = 4;          // stages that this is worth
constexpr int kLeastStages = 16;  // of a result that is dealt out

// The fastest way for results of one shape and what it takes, in nanoseconds.
inline int64_t deal(Work& work, int most_pairs, int stage) {
  const int results = work.m_blocks * work.n_blocks, rest = results % most_pairs;
  const int64_t whole = int64_t{work.stages} * stage + kTurn;
  work.pairs = std::min(results, most_pairs);
  work.turns = (results - 1) / work.pairs;
  work.group = results - work.turns * work.pairs;
  work.more = work.lead = 0;
  finish(work);
  int64_t least = (work.turns + 1) * whole;
  if (rest == 0 || work.stages < kLeastStages) {
    return least;
  }
  Work other = work;
  if (results > most_pairs) {
    other.turns = results / most_pairs - 1;
    other.group = most_pairs + rest;
    other.more = -rest;
  } else {
    other.group = 1;
    const auto groups = [&] { return (results + other.group - 1) / other.group; };
    while (results + groups() > most_pairs) {
      ++other.group;
    }
    other.more = 1;
    other.lead = kLead;
    other.pairs = results + groups();
  }
  finish(other);
  const int64_t time = other.turns * whole + int64_t{other.length} * stage + kJoin * other.rows +
                       (results > most_pairs ? 2 : 1) * kTurn;
  if (time < least) {
    work = other;
    least = time;
  }
  return least;
}

inline Work choose(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  Work best = {};
  int64_t least = INT64_MAX;
  for (const auto& cost : kCosts) {
    Work work = {cost.rows, cost.columns};
    work.m_blocks = static_cast<int>((m + cost.rows - 1) / cost.rows);
    work.n_blocks = static_cast<int>((n + 2 * cost.columns - 1) / (2 * cost.columns));
    work.stages = static_cast<int>((k + kInputs - 1) / kInputs);
    const int64_t time = deal(work, std::max(multiprocessors / 2, 1), cost.stage);
    if (time < least) {
      least = time;
      best = work;
    }
  }
  return best;
}

}  // namespace auto_gptq::wide
