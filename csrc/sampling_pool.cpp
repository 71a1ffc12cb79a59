#include "sampling_pool.h"

namespace vas {

void Pool::start(int threads) {
  closing_ = false;
  for (int thread = 1; thread < threads; ++thread) helpers_.emplace_back([this, thread] { help(thread); });
}

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  wake_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
  helpers_.clear();
}

void Pool::run(int count, Call call, void* context) {
  call_ = call, context_ = context, count_ = count;
  next_.store(0);
  const bool shared = !helpers_.empty() && count > 1;
  if (shared) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = true;
      ++generation_;
    }
    wake_.notify_all();
  }
  work(0);
  if (shared) {
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;
    done_.wait(lock, [this] { return active_ == 0; });
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::help(int thread) {
  long seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return closing_ || (open_ && generation_ != seen); });
    if (closing_) return;
    seen = generation_;
    ++active_;
    lock.unlock();
    work(thread);
    lock.lock();
    if (--active_ == 0) done_.notify_one();
  }
}

void Pool::work(int thread) {
  for (int item; (item = next_.fetch_add(1)) < count_;) {
    try {
      call_(context_, item, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
}

}  // namespace vas
