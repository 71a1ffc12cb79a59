#include "sampling_select.h"

#include <unistd.h>

#include <mutex>

#include "sampling_sequence.h"

namespace vas {
namespace {

// Fewer tokens than this are done before a helper wakes up.
constexpr int64_t kWorthSharing = 24 * 1024;

// Threads and scratch of this process. One batch runs at a time. Never destroyed: threads must not be joined at exit, nor
// in a forked child, where they do not exist.
class Engine {
 public:
  static Engine& get() {
    static std::mutex creation;
    static Engine* engine = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(creation);
    if (!engine || owner != getpid()) {
      const int threads = engine ? engine->threads_ : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
      engine = new Engine(threads);
      owner = getpid();
    }
    return *engine;
  }

  int threads() const { return threads_; }

  void resize(int threads) {
    std::lock_guard<std::mutex> lock(busy_);
    pool_.resize(threads);
    prepare(threads);
  }

  void select(const Logits& logits, const Settings& settings, const Output& out) {
    std::lock_guard<std::mutex> lock(busy_);
    auto one = [&](int index, Team team) { Sequence(logits, settings, index, out, team).run(); };
    const int count = static_cast<int>(settings.count);
    if (threads_ == 1 || count * logits.vocabulary < kWorthSharing) {
      for (int index = 0; index < count; ++index) one(index, Team(workers_, 0));
    } else if (count >= threads_) {
      pool_.run(count, [&](int index, int thread) { one(index, Team(workers_, thread)); });
    } else {
      for (int index = 0; index < count; ++index) one(index, Team(workers_, pool_));
    }
  }

 private:
  explicit Engine(int threads) : pool_(threads) { prepare(threads); }

  void prepare(int threads) {
    threads_ = threads;
    while (workers_.size() < static_cast<size_t>(threads)) workers_.push_back(std::make_unique<Worker>());
  }

  std::mutex busy_;
  Pool pool_;
  Workers workers_;
  int threads_ = 1;
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

void select(const Logits& logits, const Settings& settings, const Output& out) {
  Engine::get().select(logits, settings, out);
}

int get_num_threads() { return Engine::get().threads(); }

void set_num_threads(int count) { Engine::get().resize(count); }

}  // namespace vas
