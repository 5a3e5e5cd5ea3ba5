// How a product of many rows is parted between blocks, and which way to do so is the fastest.
//
// A result is some outputs for some rows of x, and computing it takes stages of 64 inputs.  Pairs
// of blocks compute results, each block half of the outputs: first whole ones by turns.  The stages
// of those left are laid end to end and dealt out to the pairs in equal ranges, each of which ends
// in the head of a result and begins with the tail of another.  The lower of two pairs that share a
// result does the head first and gives its sums to the higher one, which does the tail last and
// adds them.  So no pair waits for one that waits itself before it has given.
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

inline Divisor divisor(int by) { return {by, UINT32_MAX / static_cast<uint32_t>(by)}; }

// The quotient, of a number that is not negative.
AUTO_GPTQ_ANYWHERE int divide(int number, Divisor divisor, int& rest) {
  // At most one too small.
  int quotient =
      static_cast<int>(uint64_t{static_cast<uint32_t>(number)} * divisor.reciprocal >> 32);
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
  int length;  // stages that a pair gets of them; the last one of a group gets what is left
  int lead;    // but the first one so many less, since the next waits for it
  Divisor by_stages, by_size;  // of a result; pairs of a group
  Divisor by_band, by_last;    // results of a band, blocks of rows of the last one
};

constexpr int kBand = 4;  // so many results in a row have the same outputs

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
    end = end < all && place + 1 < work.by_size.by ? end : all;
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
  const Divisor height =
      work.m_blocks - above < kBand ? work.by_last : Divisor{kBand, UINT32_MAX / kBand};
  const int column = divide(inside, height, row);
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
} kCosts[] = {{128, 128, 421}, {192, 128, 545}, {256, 128, 692}, {128, 192, 577}};
constexpr int kTurn = 1000;       // to store results
constexpr int kJoin = 10;         // to give and take sums, for each row of a result
constexpr int kLead = 4;          // stages that it takes until sums are there
constexpr int kTrail = 6;         // stages that it takes to give sums
constexpr int kLeastStages = 16;  // of a result that is dealt out

// Take another way if it is faster.
inline void prefer(const Work& other, int64_t time, Work& best, int64_t& least) {
  if (time < least) {
    least = time;
    best = other;
    best.by_stages = divisor(best.stages);
    best.by_size = divisor(best.group + best.more);
    best.by_band = divisor(kBand * best.n_blocks);
    best.by_last = divisor((best.m_blocks - 1) % kBand + 1);
  }
}

// Try the ways for results of one shape: whole ones by turns, or the last of them dealt out.
inline void deal(const Work& shape, int most_pairs, int stage, Work& best, int64_t& least) {
  const int results = shape.m_blocks * shape.n_blocks, rest = results % most_pairs;
  const int64_t whole = int64_t{shape.stages} * stage + kTurn;
  Work work = shape;
  work.pairs = std::min(results, most_pairs);
  work.turns = (results - 1) / work.pairs;
  work.group = results - work.turns * work.pairs;
  work.length = shape.stages;
  prefer(work, (work.turns + 1) * whole, best, least);
  if (rest == 0 || shape.stages < kLeastStages) {
    return;
  }
  work = shape;
  if (results > most_pairs) {
    work.pairs = most_pairs;
    work.turns = results / most_pairs - 1;
    work.group = most_pairs + rest;
    work.more = -rest;
    work.length = (work.group * shape.stages + most_pairs - 1) / most_pairs;
    prefer(work, work.turns * whole + int64_t{work.length} * stage + kJoin * shape.rows + 2 * kTurn,
           best, least);
  } else {
    const auto groups = [&] { return (results + work.group - 1) / work.group; };
    for (work.group = 1; work.group < results && results + groups() > most_pairs;) {
      ++work.group;
    }
    work.more = 1;
    work.pairs = results + groups();
    work.lead = kLead;
    work.length = (work.group * shape.stages + kLead - kTrail) / (work.group + 1) + 1;
    // Else what is left for the last pair would be longer than a result.
    if (shape.stages >= kLead + work.group * kTrail) {
      prefer(work, int64_t{work.length} * stage + kJoin * shape.rows + kTurn, best, least);
    }
  }
}

inline Work choose(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  Work best = {};
  int64_t least = INT64_MAX;
  for (const auto& cost : kCosts) {
    Work shape = {cost.rows, cost.columns};
    shape.m_blocks = static_cast<int>((m + cost.rows - 1) / cost.rows);
    shape.n_blocks = static_cast<int>((n + 2 * cost.columns - 1) / (2 * cost.columns));
    shape.stages = static_cast<int>((k + kInputs - 1) / kInputs);
    deal(shape, std::max(multiprocessors / 2, 1), cost.stage, best, least);
  }
  return best;
}

}  // namespace auto_gptq::wide
