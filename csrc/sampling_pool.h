// Threads that stay: a batch of the engine is a few microseconds of work, too little to start any.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace vas {

// The caller works too and never waits for a thread that has not begun, so a late (or, after fork, missing) helper costs
// nothing but its share.
class Pool {
 public:
  explicit Pool(int threads) { start(threads); }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  void resize(int threads) {
    stop();
    start(threads);
  }

  // body(item, thread) for every item in [0, count), thread in [0, threads()). Rethrows the first exception.
  template <class Body>
  void run(int count, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(count, [](void* context, int item, int thread) { (*static_cast<Plain*>(context))(item, thread); }, &body);
  }

 private:
  using Call = void (*)(void* context, int item, int thread);

  void start(int threads);
  void stop();
  void run(int count, Call call, void* context);
  void help(int thread);
  void work(int thread);

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool closing_ = false;
  bool open_ = false;  // a job takes helpers
  long generation_ = 0;
  int active_ = 0;  // helpers inside the job
  Call call_ = nullptr;
  void* context_ = nullptr;
  int count_ = 0;
  std::atomic<int> next_{0};
  std::exception_ptr error_;
};

}  // namespace vas
