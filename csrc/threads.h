// Runs independent tasks on several cores.
//
// PyTorch's own operators run on an OpenMP pool whose idle threads spin for a while. A second pool would fight them
// for the cores, so the pool of the process is borrowed when there is one (its entry point GOMP_parallel is part of
// the stable OpenMP ABI of GCC, which LLVM's and Intel's runtimes offer too). Without one, a pool of our own serves.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#define VAS_HAS_DLSYM 1
#endif

namespace vas {

namespace detail {

inline long process() {
#ifdef VAS_HAS_DLSYM
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

struct Job {
    void (*run)(void *, int64_t, int) = nullptr;
    void *body = nullptr;
    int64_t count = 0;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    std::mutex mutex;
    std::exception_ptr error;
};

// An exception must not leave another pool's thread; the first one is kept for the caller.
inline void work(void *pointer) {
    Job &job = *static_cast<Job *>(pointer);
    const int worker = job.workers.fetch_add(1, std::memory_order_relaxed);
    try {
        for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.run(job.body, task, worker);
    } catch (...) {
        std::lock_guard<std::mutex> lock(job.mutex);
        if (!job.error) job.error = std::current_exception();
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

inline const long loader = process();

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

// A forked child borrows nothing: OpenMP's threads stayed behind and some runtimes wait for them.
inline Parallel borrowed_pool() {
#ifdef VAS_HAS_DLSYM
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return process() == loader ? found : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace detail

// The process's one object of a type. It is never destroyed, as threads may outlive static objects; a forked child, where
// locks may be held by threads that it does not have, begins with a new one.
template <class T>
T &of_process() {
    static std::atomic<T *> object{new T};
    static std::atomic<long> owner{detail::process()};
    if (owner.load() != detail::process()) {
        object.store(new T);
        owner.store(detail::process());
    }
    return *object.load();
}

// Calls body(task, worker) for every task in [0, count), on at most `threads` threads, of which `worker` in
// [0, threads) is one; returns when all are done and throws the first exception of a task.
template <class Body>
void parallel_for(int64_t count, int threads, Body &&body) {
    if (threads <= 1 || count <= 1) {
        for (int64_t task = 0; task < count; ++task) body(task, 0);
        return;
    }
    using Plain = std::remove_reference_t<Body>;
    detail::Job job;
    job.run = [](void *pointer, int64_t task, int worker) { (*static_cast<Plain *>(pointer))(task, worker); };
    job.body = const_cast<void *>(static_cast<const void *>(&body));
    job.count = count;
    // A team of another size than the pool's would make OpenMP start and stop threads, so `threads` is not cut there.
    if (const auto borrowed = detail::borrowed_pool()) {
        borrowed(detail::work, &job, static_cast<unsigned>(threads), 0);
    } else {
        of_process<detail::Pool>().run(job, threads < count ? threads : static_cast<int>(count));
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace vas
