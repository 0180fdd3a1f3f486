// Threads and scratch memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace foveate {

using Body = void (*)(void*);

// Runs `body(context)` on a team of at most `threads` threads, the calling one among them. Calls
// from several threads at once share what they asked for.
void run_team(int threads, Body body, void* context);

// Hands the tasks 0 .. count - 1, in this order, to a team; `worker(next)` runs once on each of its
// threads and draws tasks with next(task) until that returns false. False when a worker found no
// memory: then tasks are missing.
template <class Worker>
bool parallel_tasks(int threads, int64_t count, Worker&& worker) {
  struct Context {
    std::atomic<int64_t> drawn{0};
    std::atomic<bool> ok{true};
    int64_t count;
    Worker& worker;
  } context{{0}, {true}, count, worker};
  const auto body = [](void* raw) {
    auto& c = *static_cast<Context*>(raw);
    try {
      c.worker([&c](int64_t& task) {
        task = c.drawn.fetch_add(1, std::memory_order_relaxed);
        return task < c.count;
      });
    } catch (...) {  // nothing may be thrown through the OpenMP runtime
      c.ok = false;
    }
  };
  run_team(static_cast<int>(count < threads ? count : threads), body, &context);
  return context.ok;
}

// Scratch memory aligned to cache lines; throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_;
};

}  // namespace foveate
