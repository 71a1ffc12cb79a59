// Candidates and tail champion of a batch; the definition is candidate_select in kernels/reference.py.
#pragma once

#include <cstdint>

#include "sampling_kernels.h"

namespace vas {

// Logits of a batch, rows `stride` elements apart.
struct Logits {
  const void* data;
  DType dtype;
  int64_t rows, vocabulary, stride;

  const void* row(int64_t index) const {
    return static_cast<const char*>(data) + index * stride * (dtype == DType::kFloat32 ? 4 : 2);
  }
};

// Settings of S sequences; see SamplingArrays in Python.
struct Settings {
  int64_t count;
  const int64_t* rows;
  const double *temperature, *top_p, *min_p, *repetition_penalty, *presence_penalty, *frequency_penalty;
  const int32_t *top_k, *num_candidates;
  const uint64_t* seed;
  const int64_t* position;
  const bool* keep_tail;
  const int64_t* history_offsets;
  const int32_t *history_ids, *history_counts;
  const int64_t* bias_offsets;
  const int32_t* bias_ids;
  const float* bias_values;
};

// Results, [S, width] and [S]; see Selection in Python.
struct Output {
  int64_t width;
  int64_t* token_ids;
  double *log_probs, *noise;
  int64_t *count, *tail;
  double* tail_log_mass;
  bool* finite;
};

bool legal(const Logits& logits, const Settings& settings, int64_t history, int64_t bias);

// On at most `threads` threads; the result does not depend on their number.
void select(const Logits& logits, const Settings& settings, const Output& out, int threads);

}  // namespace vas
