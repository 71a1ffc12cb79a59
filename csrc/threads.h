// Runs independent tasks on several cores.
//
// PyTorch's own operators run on an OpenMP pool whose idle threads spin for a while. A second pool would fight them
// for the cores, so the pool of the process is borrowed when there is one (its entry point GOMP_parallel is part of
// the stable OpenMP ABI of GCC, which LLVM's and Intel's runtimes offer too). Without one, a pool of our own serves.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#define VAS_HAS_DLSYM 1
#endif

namespace vas {

namespace detail {

struct Job {
    void (*run)(void *, int64_t) = nullptr;
    void *body = nullptr;
    int64_t count = 0;
    std::atomic<int64_t> next{0};
};

inline void work(void *pointer) {
    Job &job = *static_cast<Job *>(pointer);
    for (;;) {
        const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= job.count) return;
        job.run(job.body, task);
    }
}

class Pool {
  public:
    // One job at a time; a caller that finds the pool busy works alone.
    void run(Job &job, int threads) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return work(&job);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < threads - 1) {
                const int index = static_cast<int>(threads_.size());
                threads_.emplace_back([this, index] { loop(index); });
                threads_.back().detach();
            }
            job_ = &job;
            wanted_ = threads - 1;
            running_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        work(&job);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        job_ = nullptr;
    }

  private:
    void loop(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen && job_ != nullptr; });
            seen = round_;
            if (index >= wanted_) continue;
            Job *job = job_;
            lock.unlock();
            work(job);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    Job *job_ = nullptr;
    int wanted_ = 0, running_ = 0;
    uint64_t round_ = 0;
};

inline Pool &own_pool() {
    // Never destroyed: its threads outlive static destruction. A forked child has none of them and starts anew.
    static std::atomic<Pool *> pool{new Pool};
#ifdef VAS_HAS_DLSYM
    static std::atomic<long> owner{static_cast<long>(getpid())};
    if (owner.load() != static_cast<long>(getpid())) {
        pool.store(new Pool);
        owner.store(static_cast<long>(getpid()));
    }
#endif
    return *pool.load();
}

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

inline Parallel borrowed_pool() {
#ifdef VAS_HAS_DLSYM
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

}  // namespace detail

// Calls body(task) for every task in [0, count), on at most `threads` threads; returns when all are done.
template <class Body>
void parallel_for(int64_t count, int threads, Body &&body) {
    if (threads > count) threads = static_cast<int>(count) > 1 && detail::borrowed_pool() ? threads : static_cast<int>(count);
    if (threads <= 1 || count <= 1) {
        for (int64_t task = 0; task < count; ++task) body(task);
        return;
    }
    using Plain = std::remove_reference_t<Body>;
    detail::Job job;
    job.run = [](void *pointer, int64_t task) { (*static_cast<Plain *>(pointer))(task); };
    job.body = const_cast<void *>(static_cast<const void *>(&body));
    job.count = count;
    // A team of another size than the pool's would make OpenMP start and stop threads, so `threads` is not cut there.
    if (const auto borrowed = detail::borrowed_pool()) {
        borrowed(detail::work, &job, static_cast<unsigned>(threads), 0);
    } else {
        detail::own_pool().run(job, threads);
    }
}

}  // namespace vas
