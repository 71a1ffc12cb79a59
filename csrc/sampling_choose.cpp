#include "sampling_choose.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vas {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double clip(double x, double limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// Adds pi(T - log Z) of every candidate and of the tail; pi0 of the tail has tilt 0.
double divergence(const double* log_probs, const double* tilt, int64_t count, int64_t tail, double tail_log_mass,
                  double log_z) {
  double kl = tail >= 0 ? -std::exp(tail_log_mass - log_z) * log_z : 0.0;
  for (int64_t c = 0; c < count; ++c) {
    const double policy = c == tail ? 0.0 : std::exp(log_probs[c] + tilt[c] - log_z);
    if (policy > 0) kl += policy * (tilt[c] - log_z);
  }
  return std::max(kl, 0.0);
}

double log_normaliser(const double* log_probs, const double* tilt, int64_t count, int64_t tail, double tail_log_mass) {
  double max = tail >= 0 ? tail_log_mass : -kInfinity, sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (c != tail) max = std::max(max, log_probs[c] + tilt[c]);
  }
  if (max == -kInfinity) return max;
  for (int64_t c = 0; c < count; ++c) {
    if (c != tail) sum += std::exp(log_probs[c] + tilt[c] - max);
  }
  return max + std::log(sum + (tail >= 0 ? std::exp(tail_log_mass - max) : 0.0));
}

}  // namespace

void value_tilt(const float* utilities, const float* baselines, const double* limits, const int64_t* row_sequence,
                int64_t rows, int64_t values, double* tilt) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t s = row_sequence[r];
    tilt[r] = 0;
    for (int64_t m = 0; m < values; ++m) {
      const double advantage = static_cast<double>(utilities[r * values + m]) - baselines[s * values + m];
      tilt[r] += clip(advantage, limits[s * values + m]);
    }
  }
}

void prune(const Columns& columns, const double* low, const double* high, const bool* all_needed, bool* needed) {
  for (int64_t s = 0; s < columns.sequences; ++s) {
    const double *log_probs = columns.log_probs + s * columns.width, *noise = columns.noise + s * columns.width;
    bool* out = needed + s * columns.width;
    const int64_t count = columns.count[s], tail = columns.tail[s];
    double floor = -kInfinity;
    for (int64_t c = 0; c < count; ++c) floor = std::max(floor, log_probs[c] + noise[c] + (c == tail ? 0.0 : low[s]));
    for (int64_t c = 0; c < columns.width; ++c) {
      out[c] = c < count && (all_needed[s] || log_probs[c] + noise[c] + (c == tail ? 0.0 : high[s]) >= floor);
    }
  }
}

Winner choose(const Columns& columns, int64_t s, const double* tilt) {
  const double *log_probs = columns.log_probs + s * columns.width, *noise = columns.noise + s * columns.width;
  const int64_t count = columns.count[s], tail = columns.tail[s];
  const double tail_log_mass = columns.tail_log_mass[s];
  Winner none{-1, -1, kNaN, kNaN, kNaN};
  if (!columns.finite[s]) return none;

  double best = -kInfinity;
  int64_t column = -1;
  bool exact = true;
  for (int64_t c = 0; c < count; ++c) {
    if (!(tilt[c] < kInfinity)) return none;
    exact &= tilt[c] > -kInfinity;
    const double score = log_probs[c] + noise[c] + tilt[c];
    if (score > best) best = score, column = c;
  }
  if (column < 0) return none;
  Winner winner{column, columns.token_ids[s * columns.width + column], log_probs[column], kNaN, kNaN};
  if (exact) {
    const double log_z = log_normaliser(log_probs, tilt, count, tail, tail_log_mass);
    winner.tilted_log_prob = log_probs[column] + tilt[column] - log_z;
    winner.kl = divergence(log_probs, tilt, count, tail, tail_log_mass, log_z);
  }
  return winner;
}

}  // namespace vas
