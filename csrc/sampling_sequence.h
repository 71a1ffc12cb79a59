// One sequence's step. Its row of logits is read once (plain sampling) or twice, in slices that threads can share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <vector>

#include "sampling_noise.h"
#include "sampling_select.h"
#include "threads.h"

namespace vas {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// A slice is the unit of work inside a row. Its size is fixed, and partial sums are added in slice order, so results do not
// depend on the number of threads.
constexpr int kSlice = 8 * kChunk;
// Same slack, and reason, as TOP_P_SLACK in kernels/reference.py.
constexpr double kTopPSlack = 1e-12;
// With top_p or min_p on, this many top tokens are gathered: mostly they hold the whole support.
constexpr int64_t kLikelySupport = 128;
// Up to this many wanted tokens, a first pass over the logits to bound the last of them pays.
constexpr int64_t kBoundTo = 512;

struct Token {
  double score;
  int64_t id;
};

// Descending score, then ascending id.
inline bool before(const Token& a, const Token& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

// The support ends with this token in the order above.
struct Cut {
  double score = -kInfinity;
  int64_t id = std::numeric_limits<int64_t>::max();

  bool active() const { return score > -kInfinity; }
};

// A token of the tail and its score plus noise.
struct Champion {
  double perturbed = -kInfinity, score = -kInfinity;
  int64_t id = -1;

  void offer(const Champion& other) {
    if (other.perturbed > perturbed || (other.perturbed == perturbed && other.id < id)) *this = other;
  }
};

// What one thread keeps between calls, so that a step allocates nothing once warm.
struct Scratch {
  alignas(64) double scores[kChunk];
  alignas(64) double weights[kChunk];
  alignas(64) float raw_maxima[kChunk];
  alignas(64) double maxima[kChunk];
  int32_t indices[kChunk];
  std::vector<Token> top;  // best tokens this thread has met
  Champion champion;       // best token of the tail this thread has met
};

// What the sequence a thread works on keeps.
struct SequenceScratch {
  std::vector<int32_t> slot;           // token -> place in patches, -1 for none; all -1 between sequences
  std::vector<Token> patches, sorted;  // scores of tokens that have a bias or a history, also by chunk
  std::vector<int> chunk_begin;        // those of chunk c are sorted[chunk_begin[c]] ...
  std::vector<Token> top, border;
  std::vector<int64_t> excluded;
  std::vector<double> slice_sum, slice_shift, histogram;
  std::vector<double> top_scores, top_weights;  // of top, padded with -inf and 0 to a multiple of 16
  std::vector<int32_t> above;
};

struct Worker {
  Scratch scratch;
  SequenceScratch sequence;
};
using Workers = std::vector<std::unique_ptr<Worker>>;

// Atomically keeps the largest value offered.
class Floor {
 public:
  double get() const { return value_.load(std::memory_order_relaxed); }
  void raise(double value) {
    double now = get();
    while (value > now && !value_.compare_exchange_weak(now, value, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<double> value_{-kInfinity};
};

// Runs the slices of a sequence on one worker, or on all of them.
class Team {
 public:
  Team(Workers& workers, int self, int threads = 1) : workers_(workers), self_(self), threads_(threads) {}

  template <class Body>
  void run(int slices, Body&& body) {
    if (threads_ > 1) {
      return parallel_for(slices, threads_, [&](int64_t slice, int worker) { body(static_cast<int>(slice), workers_[worker]->scratch); });
    }
    for (int slice = 0; slice < slices; ++slice) body(slice, local());
  }

  template <class Body>
  void each(Body&& body) {
    if (threads_ == 1) return body(local());
    for (int worker = 0; worker < threads_; ++worker) body(workers_[worker]->scratch);
  }

  Scratch& local() { return workers_[self_]->scratch; }
  SequenceScratch& sequence() { return workers_[self_]->sequence; }

 private:
  Workers& workers_;
  int self_;
  int threads_ = 1;
};

class Sequence {
 public:
  Sequence(const Logits& logits, const Settings& settings, int64_t index, const Output& out, Team team);
  void run();

 private:
  void patch();
  double raw(int64_t id);
  int load(int64_t begin, Scratch& scratch);
  void cut_chunk(int64_t begin, int n, Scratch& scratch) const;
  int64_t wanted() const;
  bool bound(int64_t wanted, float* threshold);
  void gather_raw(float threshold, int64_t wanted);
  void scan(int64_t wanted);
  void sort_top();
  void gather(int64_t begin, int n, const Extent& extent, int64_t wanted, Scratch& scratch);
  void trim(int64_t wanted, Scratch& scratch);
  void keep_best(std::vector<Token>& top, int64_t wanted);
  void limit_top_k();
  void limit_top_p();
  void limit_min_p();
  Cut nucleus(double target);
  double weight_of_top(size_t begin, size_t end) const;
  double weight_of_tail(size_t begin) const;
  double sweep(bool racing, double* shift);
  void sweep_slice(int slice, bool racing, double fixed_shift, Scratch& scratch);
  void race_chunk(int64_t begin, int n, double shift, Scratch& scratch);
  Champion race_list(size_t begin);
  void plain();
  void guided();
  void column(int64_t place, const Token& token, double log_prob);
  void finish(int64_t count, int64_t tail, double tail_log_mass, bool finite);

  const Logits& logits_;
  const Settings& settings_;
  const int64_t index_;
  const Output& out_;
  Team team_;
  SequenceScratch& own_;
  const Kernels& kernels_;
  const void* row_;
  const int64_t vocabulary_;
  const int slices_;
  const bool greedy_;
  const double scale_;
  const int64_t candidates_;
  const NoiseStream noise_;
  // own_.top[0, support_) is the support when small_, else the support is what cut_ keeps, which contains all of top.
  bool complete_ = false, small_ = false;
  size_t support_ = 0;
  Cut cut_;
  Floor threshold_, best_;
  std::atomic<bool> bad_{false};
};

}  // namespace vas
