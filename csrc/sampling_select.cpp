#include "sampling_select.h"

#include <mutex>

#include "sampling_sequence.h"

namespace vas {
namespace {

// Fewer tokens than this are done before another thread has begun.
constexpr int64_t kWorthSharing = 24 * 1024;

// What the workers keep between batches. One batch runs at a time.
class Scratches {
 public:
  void select(const Logits& logits, const Settings& settings, const Output& out, int threads) {
    std::lock_guard<std::mutex> lock(busy_);
    while (workers_.size() < static_cast<size_t>(threads)) workers_.push_back(std::make_unique<Worker>());
    auto one = [&](int64_t index, Team team) { Sequence(logits, settings, index, out, team).run(); };
    if (settings.count * logits.vocabulary < kWorthSharing) threads = 1;
    if (settings.count >= threads) {
      parallel_for(settings.count, threads, [&](int64_t index, int worker) { one(index, Team(workers_, worker)); });
    } else {
      for (int64_t index = 0; index < settings.count; ++index) one(index, Team(workers_, 0, threads));
    }
  }

 private:
  std::mutex busy_;
  Workers workers_;
};

bool rises(const int64_t* offsets, int64_t count, int64_t last) {
  if (offsets[0] != 0 || offsets[count] != last) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (offsets[i] > offsets[i + 1]) return false;
  }
  return true;
}

bool all_below(const int32_t* ids, int64_t count, int64_t limit) {
  bool fine = true;
  for (int64_t i = 0; i < count; ++i) fine &= ids[i] >= 0 && ids[i] < limit;
  return fine;
}

bool legal_settings(const Settings& s, int64_t i, int64_t rows) {
  auto finite = [](double x) { return std::isfinite(x); };
  const double t = s.temperature[i], r = s.repetition_penalty[i];
  return s.rows[i] >= 0 && s.rows[i] < rows && finite(t) && (t == 0 || t >= 1e-8) && s.top_k[i] >= 0 &&
         s.top_p[i] >= 0 && s.top_p[i] <= 1 && s.min_p[i] >= 0 && s.min_p[i] <= 1 && finite(r) && r > 0 &&
         finite(s.presence_penalty[i]) && finite(s.frequency_penalty[i]) && s.position[i] >= 0 &&
         s.num_candidates[i] >= 0;
}

}  // namespace

bool legal(const Logits& logits, const Settings& s, int64_t history, int64_t bias) {
  if (logits.vocabulary < 1 || logits.vocabulary > std::numeric_limits<int32_t>::max()) return false;
  for (int64_t i = 0; i < s.count; ++i) {
    if (!legal_settings(s, i, logits.rows)) return false;
  }
  if (!rises(s.history_offsets, s.count, history) || !rises(s.bias_offsets, s.count, bias)) return false;
  if (!all_below(s.history_ids, history, logits.vocabulary) || !all_below(s.bias_ids, bias, logits.vocabulary)) return false;
  for (int64_t i = 0; i < history; ++i) {
    if (s.history_counts[i] < 0) return false;
  }
  for (int64_t i = 0; i < bias; ++i) {
    if (!(s.bias_values[i] < std::numeric_limits<float>::infinity())) return false;
  }
  return true;
}

void select(const Logits& logits, const Settings& settings, const Output& out, int threads) {
  of_process<Scratches>().select(logits, settings, out, std::max(threads, 1));
}

}  // namespace vas
