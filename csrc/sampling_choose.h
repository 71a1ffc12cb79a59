// Tilt, pruning and winner; the definitions are value_tilt, prune_candidates and choose_winner in kernels/reference.py.
#pragma once

#include <cstdint>

namespace vas {

// [S, width] and [S]; see Selection in Python.
struct Columns {
  int64_t sequences, width;
  const int64_t* token_ids;
  const double *log_probs, *noise;
  const int64_t *count, *tail;
  const double* tail_log_mass;
  const bool* finite;
};

struct Winner {
  int64_t column, token_id;
  double log_prob, tilted_log_prob, kl;
};

void value_tilt(const float* utilities, const float* baselines, const double* limits, const int64_t* row_sequence,
                int64_t rows, int64_t values, double* tilt);

void prune(const Columns& columns, const double* low, const double* high, const bool* all_needed, bool* needed);

Winner choose(const Columns& columns, int64_t sequence, const double* tilt);

}  // namespace vas
