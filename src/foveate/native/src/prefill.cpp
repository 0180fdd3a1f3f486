// Exact softmax attention of many queries over lists of key blocks, or over all keys.

#include "prefill.hpp"

#include <algorithm>
#include <vector>

namespace foveate {
namespace {

// One query block of the heads [head, head + heads) of a batch row.
struct Task {
  int32_t b, head, heads, tile;
  int64_t work;
};

class Worker {
 public:
  Worker(const PrefillCall& call, int max_rows)
      : c(call), space(call, int(padded(max_rows))), tiles(padded(max_rows) / kWidth) {}

  void run(const Task& task) {
    start(task);
    const int64_t kv = task.head / (c.q_heads / c.kv_heads);
    const int most = chunk_keys(c);
    const List list = list_of(c, task.b, task.head, task.tile);
    for (int64_t i = 0; i < list.blocks; ++i) {
      const int32_t j = list.indices == nullptr ? static_cast<int32_t>(i) : list.indices[i];
      const int32_t start = j * c.block_k, end = std::min(start + c.block_k, c.k_len);
      if (!seen(start, end)) continue;
      for (int32_t at = start; at < end;) {
        const int32_t count = std::min(end - at, most - space.chunk.count);
        space.add(c, task.b, kv, at, count, list.mask(c, i, at - start));
        at += count;
        if (space.chunk.count == most) advance(c, space, tiles.data(), used);
      }
      if (c.skip_rows > 0) advance(c, space, tiles.data(), used);
    }
    advance(c, space, tiles.data(), used);
    finish(task);
  }

 private:
  void start(const Task& task) {
    first_row = std::max(0, task.tile * c.block_q - c.lead);
    rows = std::min((task.tile + 1) * c.block_q - c.lead, c.q_len) - first_row;
    const int count = rows * task.heads;
    used = 0;
    for (int lane = 0; lane < count; lane += tiles[used++].vectors * kWidth) {
      Lanes& t = tiles[used];
      const int left = int(padded(count - lane)) / kWidth;
      // Rows that skip together lie in one tile.
      const bool wide = c.skip_rows > kWidth;
      space.place(c, t, lane, wide ? std::min(left, c.skip_rows / kWidth) : vectors_of(left));
      clear(c, t);
      for (int l = 0; l < t.vectors * kWidth; ++l) {
        // Lanes past the last row repeat it; nothing of them is written.
        const int i = std::min(lane + l, count - 1);
        seat(c, t, l, task.b, task.head + i / rows, first_row + i % rows);
      }
    }
    for (int r = 0; r < c.run_count; ++r) {
      low[r] = c.k_len;
      high[r] = 0;
      for (int t = 0; t < used; ++t) {
        low[r] = std::min(low[r], tiles[t].low[r]);
        high[r] = std::max(high[r], tiles[t].high[r]);
      }
    }
  }

  // Whether a row of the task may see a key of [start, end).
  bool seen(int32_t start, int32_t end) const {
    for (int r = 0; r < c.run_count; ++r)
      if (start < high[r] && low[r] < end) return true;
    return false;
  }

  void finish(const Task& task) {
    int lane = 0;
    for (int t = 0; t < used; ++t) {
      const Lanes& lanes = tiles[t];
      const int n = lanes.vectors * kWidth;
      for (int l = 0; l < n && lane < rows * task.heads; ++l, ++lane)
        settle(c, lanes.out + l, n, lanes.top[l], lanes.total[l], task.b, task.head + lane / rows,
               first_row + lane % rows);
    }
  }

  const PrefillCall& c;
  Workspace space;
  std::vector<Lanes> tiles;
  int first_row = 0, rows = 0, used = 0;
  int32_t low[kMaxRuns], high[kMaxRuns];  // hull of the runs of all rows
};

std::vector<Task> tasks_of(const PrefillCall& c) {
  const int group = c.q_heads / c.kv_heads;
  const int share = std::min(c.indices == nullptr ? group : c.q_heads / c.lists, group);
  const int fit = std::max(1, kState / (c.block_q * std::max(c.dim, c.v_dim)));
  // A group of rows that skip together must not run over into the next head.
  const int heads = c.skip_rows > 0 ? 1 : std::min(share, fit);
  std::vector<Task> tasks;
  for (int b = 0; b < c.batch; ++b)
    for (int h = 0; h < c.q_heads; h += share)
      for (int from = 0; from < share; from += heads)
        for (int t = c.first_tile; t < c.first_tile + c.tiles_q; ++t) {
          const int n = std::min(heads, share - from);
          // Without lists the keys that a row sees are not known here: causality is assumed.
          const int64_t work = c.indices == nullptr ? t : list_of(c, b, h, t).blocks;
          tasks.push_back(Task{b, h + from, n, t, work * n});
        }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& x, const Task& y) { return x.work > y.work; });
  return tasks;
}

}  // namespace
}  // namespace foveate

// Whether a group of `rows` lanes that skip together fits into a tile.
FOVEATE_EXPORT int32_t foveate_skip_fits(int32_t rows) {
  using namespace foveate;
  return rows <= kWidth ? kWidth % rows == 0 : rows % kWidth == 0 && rows / kWidth <= kVectors;
}

FOVEATE_EXPORT int32_t foveate_prefill(const foveate::PrefillCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const PrefillCall& c) {
    const std::vector<Task> tasks = tasks_of(c);
    int heads = 1;
    for (const Task& t : tasks) heads = std::max(heads, t.heads);
    const bool ok = parallel_tasks(c.threads, tasks.size(), [&](auto&& next) {
      Worker worker(c, heads * c.block_q);
      for (int64_t i; next(i);) worker.run(tasks[i]);
    });
    return ok ? kDone : kNoMemory;
  });
}
