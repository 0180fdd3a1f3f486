#include "runtime.hpp"

#include <thread>
#include <vector>

#include "abi.hpp"

namespace foveate {
namespace {

// The entry of the OpenMP runtime that is already in the process. A second pool of threads would
// spin against its own on a small machine.
using OmpParallel = void (*)(Body, void*, unsigned, unsigned);
std::atomic<OmpParallel> omp_parallel{nullptr};
std::atomic<int> calls{0};

void run_own_team(int threads, Body body, void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    try {
      others.emplace_back(body, context);
    } catch (...) {
      break;  // fewer threads draw the same tasks
    }
  }
  body(context);
  for (auto& t : others) t.join();
}

}  // namespace

void run_team(int threads, Body body, void* context) {
  const int callers = calls.fetch_add(1) + 1;
  const int team = threads / callers;
  const OmpParallel omp = omp_parallel.load();
  if (team <= 1) {
    body(context);
  } else if (omp != nullptr) {
    omp(body, context, static_cast<unsigned>(team), 0);
  } else {
    run_own_team(team, body, context);
  }
  calls.fetch_sub(1);
}

}  // namespace foveate

FOVEATE_EXPORT void foveate_use_omp(void* parallel) {
  foveate::omp_parallel.store(reinterpret_cast<foveate::OmpParallel>(parallel));
}

// Whether this processor runs what a library for `isa` holds: 0 portable, 1 AVX2, 2 AVX-512.
FOVEATE_EXPORT int32_t foveate_cpu_has(int32_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 1) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (isa == 2) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
#endif
  return isa == 0;
}
