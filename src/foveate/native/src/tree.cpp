// Binary search for the key blocks that a few queries agree with most.

#include <algorithm>
#include <cmath>
#include <vector>

#include "abi.hpp"
#include "numbers.hpp"
#include "runtime.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace foveate {

// Mirrors _Call in tree_search.py.
struct TreeCall {
  Tensor q;  // (search, -, row, dim): the batch stride is that of a search
  Tensor k;  // (-, head, row, dim)
  const int64_t *lane, *end;
  const int64_t* pos;  // (search, row), or null
  int64_t* found;      // (search, slots)
  uint8_t* real;
  int32_t searches, rows, dim, k_len, slots, start, width;
  int32_t shift;  // representative block of a run: 0 its centre, 1 its first, 2 its last
  int32_t dtype, threads;
};

namespace {

constexpr int kKeys = 64;  // keys that are scored at a time

// A run of key blocks.
struct Run {
  int64_t first, size;
  float score;
};

class Searcher {
 public:
  explicit Searcher(const TreeCall& call)
      : c(call),
        lanes(padded(call.rows)),
        memory(4 * (size_t(lanes) * c.dim + kKeys * (c.dim + kVectors * kWidth))),
        runs(2 * size_t(c.slots)) {
    q = memory.as<float>();
    copy = q + size_t(lanes) * c.dim;
    scores_at = copy + size_t(kKeys) * c.dim;
  }

  void run(int64_t search) {
    at = search;
    load_queries();
    const int64_t blocks = std::max<int64_t>(c.end[at] - c.start + c.width - 1, 0) / c.width;
    bool split = false;
    for (int64_t i = 0; i < c.slots; ++i) {
      const int64_t low = blocks * i / c.slots;
      runs[i] = Run{low, blocks * (i + 1) / c.slots - low, 0.0f};
      split |= runs[i].size > 1;
    }
    while (split) {
      for (int64_t i = 0; i < c.slots; ++i) {
        const Run whole = runs[i];
        const int64_t half = whole.size / 2;
        runs[i] = Run{whole.first, half, -INFINITY};
        runs[c.slots + i] = Run{whole.first + half, whole.size - half, -INFINITY};
      }
      score();
      std::nth_element(runs.begin(), runs.begin() + c.slots - 1, runs.end(),
                       [](const Run& x, const Run& y) {
                         return x.score != y.score ? x.score > y.score : x.size > y.size;
                       });
      split = std::any_of(runs.begin(), runs.begin() + c.slots,
                          [](const Run& x) { return x.size > 1; });
    }
    for (int64_t i = 0; i < c.slots; ++i) {
      c.found[at * c.slots + i] = runs[i].first;
      c.real[at * c.slots + i] = runs[i].size > 0;
    }
  }

 private:
  // Queries lie across lanes, tile after tile: (dim, lanes of the tile).
  void load_queries() {
    for (int64_t from = 0, n; from < lanes; from += n) {
      n = vectors_of(int((lanes - from) / kWidth)) * kWidth;
      for (int64_t l = 0; l < n; ++l) {
        // Lanes past the last row repeat it: that changes no maximum.
        const int64_t row = std::min<int64_t>(from + l, c.rows - 1);
        for (int d = 0; d < c.dim; ++d)
          q[from * c.dim + d * n + l] = number(c.q, c.dtype, at * c.q.batch + row * c.q.row + d);
      }
    }
  }

  int64_t representative(const Run& run) const {
    return run.first + (c.shift == 0 ? run.size / 2 : c.shift == 1 ? 0 : run.size - 1);
  }

  // Scores every run by its representative block.
  void score() {
    count = 0;
    for (size_t i = 0; i < runs.size(); ++i) {
      if (runs[i].size == 0) continue;
      const int64_t first = c.start + representative(runs[i]) * c.width;
      const int64_t end = std::min({first + c.width, c.end[at], int64_t{c.k_len}});
      for (int64_t key = first; key < end; ++key) {
        add(key, i);
        if (count == kKeys) flush();
      }
    }
    flush();
  }

  void add(int64_t key, size_t run) {
    const int64_t from = c.lane[at] * c.k.head + key * c.k.row;
    keys[count] = key;
    owner[count] = run;
    rows[count] = static_cast<const float*>(c.k.data) + from;
    if (c.dtype != kFloat32) {
      numbers(c.k, c.dtype, from, c.dim, copy + size_t(count) * c.dim);
      rows[count] = copy + size_t(count) * c.dim;
    }
    ++count;
  }

  void flush() {
    for (int64_t from = 0, n; from < lanes && count > 0; from += n) {
      n = vectors_of(int((lanes - from) / kWidth)) * kWidth;
      if (n == 3 * kWidth) best<3>(from);
      if (n == 2 * kWidth) best<2>(from);
      if (n == 1 * kWidth) best<1>(from);
    }
    count = 0;
  }

  // Raises the scores of runs to the largest product of their keys with a tile of queries.
  template <int N>
  void best(int64_t from) {
    scores<N>(q + from * c.dim, rows, count, c.dim, scores_at);
    for (int j = 0; j < count; ++j) {
      float* s = scores_at + j * N * kWidth;
      if (c.pos != nullptr)
        for (int l = 0; l < N * kWidth; ++l)
          if (keys[j] > c.pos[at * c.rows + std::min<int64_t>(from + l, c.rows - 1)])
            s[l] = -INFINITY;
      Vec top = load(s);
      for (int n = 1; n < N; ++n) {
        const Vec x = load(s + n * kWidth);
        top = x > top ? x : top;
      }
      float& score = runs[owner[j]].score;
      for (int l = 0; l < kWidth; ++l) score = std::max(score, top[l]);
    }
  }

  const TreeCall& c;
  int64_t lanes, at = 0;
  Scratch memory;
  float *q, *copy, *scores_at;
  std::vector<Run> runs;
  const float* rows[kKeys];
  int64_t keys[kKeys];
  size_t owner[kKeys];
  int count = 0;
};

}  // namespace
}  // namespace foveate

FOVEATE_EXPORT int32_t foveate_tree_search(const foveate::TreeCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const TreeCall& c) {
    const bool ok = parallel_tasks(c.threads, c.searches, [&](auto&& next) {
      Searcher searcher(c);
      for (int64_t i; next(i);) searcher.run(i);
    });
    return ok ? kDone : kNoMemory;
  });
}
