// Exact softmax attention of many queries over lists of key blocks, or over all keys.
//
// Queries lie across the lanes of a vector: scores are held as (key, query), so maxima and sums
// over keys need no shuffles, and keys and values are read in place, one broadcast number at a time.

#include <algorithm>
#include <cmath>
#include <vector>

#include "abi.hpp"
#include "runtime.hpp"
#include "simd.hpp"

namespace foveate {

// Mirrors PrefillCall in prefill.py.
struct PrefillCall {
  Tensor q, k, v, out;
  float* lse;              // (batch, q_heads, q_len), contiguous
  const int32_t* indices;  // null: every query block reads every key block
  const int32_t* counts;
  const int32_t* runs;   // the runs [first, end) of keys that a row may see
  const uint8_t* tiles;  // masks of single blocks (key, row), or null
  const int32_t* tile_of;  // like indices: which tile masks an entry, -1 for none
  int64_t indices_batch, indices_head, counts_batch, counts_head;  // strides; 0 broadcasts
  int64_t tile_batch, tile_head;  // strides of tile_of
  int64_t runs_batch, runs_head;
  int32_t batch, q_heads, kv_heads, q_len, k_len, dim, v_dim;
  int32_t width;     // slots of a list
  int32_t lists;     // heads that have lists: 1, kv_heads or q_heads
  int32_t block_q, block_k, lead, first_tile, tiles_q;
  int32_t run_count;
  int32_t dtype, threads;
  float scale, softcap;  // softcap 0: none
};

namespace {

#if defined(__AVX512F__)
constexpr int kBroadcasts = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kBroadcasts = 4, kVectors = 3;
#else
constexpr int kBroadcasts = 4, kVectors = 2;
#endif
constexpr int kChunk = 64;       // keys between two updates of the running maximum
constexpr int kState = 1 << 14;  // numbers of queries that a task keeps at hand
constexpr int kMaxRuns = 4;

// Keys that lie in a row, and the tile that masks them.
struct Segment {
  int32_t start, count;
  int32_t tile;       // -1: none
  int32_t tile_from;  // first key of the segment inside of its block
};

// A tile of queries: up to kVectors vectors of lanes with their running softmax.
struct Lanes {
  float* q;    // (dim, lanes), scaled by scale * log2(e)
  float* out;  // (v_dim, lanes), not yet divided
  float* top;
  float* total;
  const int32_t* runs;  // (run_count, 2, lanes)
  const int32_t* row;   // (lanes): head of the task * block_q + row of the block
  int32_t vectors;
  int32_t low[kMaxRuns], high[kMaxRuns];    // hull of the lanes' runs
  int32_t inner[kMaxRuns], outer[kMaxRuns];  // keys that all lanes see: [inner, outer)
};

template <int K, int N>
inline void scores_tile(const float* q, const float* k, int64_t stride, int dim, float* s) {
  Vec acc[K][N] = {};
  for (int d = 0; d < dim; ++d) {
    Vec lane[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) lane[n] = load(q + (int64_t{d} * N + n) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Vec key = splat(k[i * stride + d]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] += key * lane[n];
    }
  }
  for (int i = 0; i < K; ++i)
    for (int n = 0; n < N; ++n) store(s + (i * N + n) * kWidth, acc[i][n]);
}

// s (count, lanes) = keys (count, dim) times q (dim, lanes).
template <int N>
void scores(const float* q, const float* k, int64_t stride, int count, int dim, float* s) {
  int i = 0;
  for (; i + kBroadcasts <= count; i += kBroadcasts)
    scores_tile<kBroadcasts, N>(q, k + i * stride, stride, dim, s + i * N * kWidth);
  for (; i < count; ++i) scores_tile<1, N>(q, k + i * stride, stride, dim, s + i * N * kWidth);
}

template <int K, int N>
inline void values_tile(const float* p, const float* v, int64_t stride, int count, float* out) {
  Vec acc[K][N];
  for (int i = 0; i < K; ++i)
    for (int n = 0; n < N; ++n) acc[i][n] = load(out + (i * N + n) * kWidth);
  for (int j = 0; j < count; ++j) {
    Vec lane[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) lane[n] = load(p + (j * N + n) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Vec value = splat(v[j * stride + i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] += value * lane[n];
    }
  }
  for (int i = 0; i < K; ++i)
    for (int n = 0; n < N; ++n) store(out + (i * N + n) * kWidth, acc[i][n]);
}

// out (dim, lanes) += values (count, dim) transposed times p (count, lanes); dim % 8 == 0.
template <int N>
void values(const float* p, const float* v, int64_t stride, int count, int dim, float* out) {
  for (int i = 0; i < dim; i += kBroadcasts)
    values_tile<kBroadcasts, N>(p, v + i, stride, count, out + i * N * kWidth);
}

inline Vec tanh_of(Vec x) {
  // 1 - 2 / (e^2|x| + 1), with the exponent kept at or below 0.
  const Vec size = x < 0.0f ? -x : x;
  const Vec e = exp2_of(size * (-2.0f * kLog2e));
  const Vec t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

template <int N>
void hide(const PrefillCall& c, const Lanes& lanes, const Segment& seg, float* s) {
  const IntVec none = splat(int32_t{0});
  for (int j = 0; j < seg.count; ++j) {
    const IntVec key = splat(seg.start + j);
    for (int n = 0; n < N; ++n) {
      IntVec seen = none;
      for (int r = 0; r < c.run_count; ++r) {
        const int32_t* run = lanes.runs + r * 2 * N * kWidth + n * kWidth;
        seen |= (key >= load_int(run)) & (key < load_int(run + N * kWidth));
      }
      float* at = s + (j * N + n) * kWidth;
      store(at, seen ? load(at) : splat(-INFINITY));
    }
    if (seg.tile >= 0) {
      const uint8_t* tile = c.tiles + int64_t{seg.tile} * c.block_k * c.block_q;
      tile += int64_t{seg.tile_from + j} * c.block_q;
      for (int l = 0; l < N * kWidth; ++l)
        if (!tile[lanes.row[l] % c.block_q]) s[j * N * kWidth + l] = -INFINITY;
    }
  }
}

// Softmax of scores s (count, lanes) in place, on top of what the lanes have seen before.
template <int N>
void softmax(const PrefillCall& c, const Lanes& lanes, int count, float* s) {
  const Vec low = splat(-INFINITY);
  for (int n = 0; n < N; ++n) {
    float* at = s + n * kWidth;
    const Vec before = load(lanes.top + n * kWidth);
    Vec top = before;
    for (int j = 0; j < count; ++j) {
      const Vec x = load(at + j * N * kWidth);
      top = x > top ? x : top;
    }
    const Vec base = top == low ? splat(0.0f) : top;
    const Vec shrink = exp2_of(before - base);
    Vec total = load(lanes.total + n * kWidth) * shrink;
    for (int j = 0; j < count; ++j) {
      const Vec p = exp2_of(load(at + j * N * kWidth) - base);
      store(at + j * N * kWidth, p);
      total += p;
    }
    store(lanes.top + n * kWidth, top);
    store(lanes.total + n * kWidth, total);
    bool moved = false;
    for (int l = 0; l < kWidth; ++l) moved |= top[l] != before[l];
    if (moved)
      for (int d = 0; d < c.v_dim; ++d) {
        float* o = lanes.out + (d * N + n) * kWidth;
        store(o, load(o) * shrink);
      }
  }
}

// The keys and values of a chunk in float32: where they lie, or copies.
struct Staged {
  const float *k, *v;
  int64_t k_stride, v_stride;
};

template <int N>
void step(const PrefillCall& c, Lanes& lanes, const Segment* segments, const Staged* staged,
          int count, float* s) {
  int keys = 0;
  int from[kChunk], length[kChunk], which[kChunk], used = 0;
  for (int i = 0; i < count; ++i) {
    Segment seg = segments[i];
    int low = c.k_len, high = 0;
    bool whole = false;
    for (int r = 0; r < c.run_count; ++r) {
      low = std::min(low, std::max(lanes.low[r], seg.start));
      high = std::max(high, std::min(lanes.high[r], seg.start + seg.count));
    }
    if (low >= high) continue;
    Segment part{low, high - low, seg.tile, seg.tile_from + low - seg.start};
    for (int r = 0; r < c.run_count; ++r)
      whole |= lanes.inner[r] <= part.start && part.start + part.count <= lanes.outer[r];
    const int skip = low - seg.start;
    const Staged& at = staged[i];
    scores<N>(lanes.q, at.k + skip * at.k_stride, at.k_stride, part.count, c.dim,
              s + keys * N * kWidth);
    if (c.softcap > 0) {
      const float cap = c.softcap * kLog2e;
      for (int j = keys * N; j < (keys + part.count) * N; ++j)
        store(s + j * kWidth, cap * tanh_of(load(s + j * kWidth) * (1.0f / cap)));
    }
    if (!whole || seg.tile >= 0) hide<N>(c, lanes, part, s + keys * N * kWidth);
    which[used] = i;
    from[used] = skip;
    length[used++] = part.count;
    keys += part.count;
  }
  if (keys == 0) return;
  softmax<N>(c, lanes, keys, s);
  keys = 0;
  for (int i = 0; i < used; ++i) {
    const Staged& at = staged[which[i]];
    values<N>(s + keys * N * kWidth, at.v + from[i] * at.v_stride, at.v_stride, length[i], c.v_dim,
              lanes.out);
    keys += length[i];
  }
}

// One query block of the heads [head, head + heads) of a batch row.
struct Task {
  int32_t b, head, heads, tile;
  int64_t work;
};

inline float number(const Tensor& x, int32_t dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(x.data)[at];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(x.data)[at]} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void put(const Tensor& x, int32_t dtype, int64_t at, float value) {
  void* data = const_cast<void*>(x.data);
  if (dtype == kFloat32) {
    static_cast<float*>(data)[at] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(rounded);
}

class Worker {
 public:
  Worker(const PrefillCall& call, int max_rows)
      : c(call),
        lanes_max((max_rows + kWidth - 1) / kWidth * kWidth),
        memory(bytes()) {
    float* at = memory.as<float>();
    q = take(at, size_t(lanes_max) * c.dim);
    out = take(at, size_t(lanes_max) * c.v_dim);
    top = take(at, lanes_max);
    total = take(at, lanes_max);
    runs = reinterpret_cast<int32_t*>(take(at, size_t(lanes_max) * 2 * c.run_count));
    row = reinterpret_cast<int32_t*>(take(at, lanes_max));
    s = take(at, size_t(kChunk) * kVectors * kWidth);
    k_copy = take(at, size_t(kChunk) * c.dim);
    v_copy = take(at, size_t(kChunk) * c.v_dim);
  }

  void run(const Task& task) {
    start(task);
    const int32_t* list = nullptr;
    const int32_t* masks = nullptr;
    int64_t blocks = (c.k_len + c.block_k - 1) / c.block_k;
    if (c.indices != nullptr) {
      const int64_t h = task.head / (c.q_heads / c.lists);
      list = c.indices + task.b * c.indices_batch + h * c.indices_head + int64_t{task.tile} * c.width;
      blocks = c.counts[task.b * c.counts_batch + h * c.counts_head + task.tile];
      if (c.tile_of != nullptr)
        masks = c.tile_of + task.b * c.tile_batch + h * c.tile_head + int64_t{task.tile} * c.width;
    }
    int kept = 0, keys = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const int32_t j = list == nullptr ? static_cast<int32_t>(i) : list[i];
      const int32_t mask = masks == nullptr ? -1 : masks[i];
      int32_t at = std::max(j * c.block_k, low);
      const int32_t end = std::min({(j + 1) * c.block_k, c.k_len, high});
      while (at < end) {
        const int32_t count = std::min(end - at, kChunk - keys);
        segments[kept++] = Segment{at, count, mask, at - j * c.block_k};
        keys += count;
        at += count;
        if (keys == kChunk) {
          chunk(task, kept);
          kept = keys = 0;
        }
      }
    }
    if (kept > 0) chunk(task, kept);
    finish(task);
  }

 private:
  static float* take(float*& at, size_t count) {
    float* p = at;
    at += (count + 15) / 16 * 16;
    return p;
  }
  size_t bytes() const {
    const size_t lanes = lanes_max;
    const size_t state = lanes * (c.dim + c.v_dim + 3 + 2 * c.run_count);
    return 4 * (state + kChunk * (size_t{kVectors} * kWidth + c.dim + c.v_dim) + 9 * 16);
  }

  void start(const Task& task) {
    first_row = std::max(0, task.tile * c.block_q - c.lead);
    rows = std::min((task.tile + 1) * c.block_q - c.lead, c.q_len) - first_row;
    const int lane_count = rows * task.heads;
    used = 0;
    low = c.k_len;
    high = 0;
    int lane = 0;
    float* at[4] = {q, out, top, total};
    int32_t *run_at = runs, *row_at = row;
    while (lane < lane_count) {
      Lanes& t = tiles[used++];
      const int left = (lane_count - lane + kWidth - 1) / kWidth;
      t.vectors = std::min(left, kVectors);
      const int n = t.vectors * kWidth;
      t.q = at[0], t.out = at[1], t.top = at[2], t.total = at[3];
      t.runs = run_at, t.row = row_at;
      fill(task, t, lane, lane_count, run_at, row_at);
      at[0] += n * c.dim, at[1] += n * c.v_dim, at[2] += n, at[3] += n;
      run_at += 2 * c.run_count * n, row_at += n;
      lane += n;
    }
  }

  void fill(const Task& task, Lanes& t, int lane, int lane_count, int32_t* run_at,
            int32_t* row_at) {
    const int n = t.vectors * kWidth;
    const float factor = c.scale * kLog2e;
    for (int r = 0; r < c.run_count; ++r) {
      t.low[r] = t.outer[r] = c.k_len;
      t.high[r] = t.inner[r] = 0;
    }
    std::fill(t.out, t.out + n * c.v_dim, 0.0f);
    std::fill(t.top, t.top + n, -INFINITY);
    std::fill(t.total, t.total + n, 0.0f);
    for (int l = 0; l < n; ++l) {
      // Lanes past the last row repeat it; nothing of them is written.
      const int i = std::min(lane + l, lane_count - 1);
      const int head = task.head + i / rows, r0 = first_row + i % rows;
      row_at[l] = (i / rows) * c.block_q + (r0 + c.lead) % c.block_q;
      const int64_t from = task.b * c.q.batch + head * c.q.head + r0 * c.q.row;
      for (int d = 0; d < c.dim; ++d) t.q[d * n + l] = number(c.q, c.dtype, from + d) * factor;
      const int32_t* run = c.runs + task.b * c.runs_batch + head * c.runs_head;
      run += int64_t{r0} * c.run_count * 2;
      for (int r = 0; r < c.run_count; ++r) {
        const int32_t a = std::max(run[2 * r], 0), z = std::min(run[2 * r + 1], c.k_len);
        run_at[(r * 2) * n + l] = a;
        run_at[(r * 2 + 1) * n + l] = z;
        if (a < z) {
          t.low[r] = std::min(t.low[r], a);
          t.high[r] = std::max(t.high[r], z);
        }
        t.inner[r] = std::max(t.inner[r], a);
        t.outer[r] = std::min(t.outer[r], z);
      }
    }
    for (int r = 0; r < c.run_count; ++r) {
      low = std::min(low, t.low[r]);
      high = std::max(high, t.high[r]);
    }
  }

  void chunk(const Task& task, int count) {
    const int64_t kv = task.head / (c.q_heads / c.kv_heads);
    Staged staged[kChunk];
    int copied = 0;
    for (int i = 0; i < count; ++i) {
      const Segment& seg = segments[i];
      const int64_t k_at = task.b * c.k.batch + kv * c.k.head + seg.start * c.k.row;
      const int64_t v_at = task.b * c.v.batch + kv * c.v.head + seg.start * c.v.row;
      if (c.dtype == kFloat32) {
        staged[i] = Staged{static_cast<const float*>(c.k.data) + k_at,
                           static_cast<const float*>(c.v.data) + v_at, c.k.row, c.v.row};
        continue;
      }
      staged[i] = Staged{k_copy + copied * c.dim, v_copy + copied * c.v_dim, c.dim, c.v_dim};
      for (int j = 0; j < seg.count; ++j, ++copied) {
        for (int d = 0; d < c.dim; ++d)
          k_copy[copied * c.dim + d] = number(c.k, c.dtype, k_at + j * c.k.row + d);
        for (int d = 0; d < c.v_dim; ++d)
          v_copy[copied * c.v_dim + d] = number(c.v, c.dtype, v_at + j * c.v.row + d);
      }
    }
    for (int t = 0; t < used; ++t) {
      Lanes& lanes = tiles[t];
      if (lanes.vectors == 3) step<3>(c, lanes, segments, staged, count, s);
      if (lanes.vectors == 2) step<2>(c, lanes, segments, staged, count, s);
      if (lanes.vectors == 1) step<1>(c, lanes, segments, staged, count, s);
    }
  }

  void finish(const Task& task) {
    int lane = 0;
    for (int t = 0; t < used; ++t) {
      const Lanes& lanes = tiles[t];
      const int n = lanes.vectors * kWidth;
      for (int l = 0; l < n && lane < rows * task.heads; ++l, ++lane) {
        const int head = task.head + lane / rows, r = first_row + lane % rows;
        const float sum = lanes.total[l];
        const bool empty = lanes.top[l] == -INFINITY && !(sum != sum);
        const float inverse = empty ? 0.0f : 1.0f / sum;
        const int64_t to = task.b * c.out.batch + head * c.out.head + r * c.out.row;
        for (int d = 0; d < c.v_dim; ++d)
          put(c.out, c.dtype, to + d, empty ? 0.0f : lanes.out[d * n + l] * inverse);
        c.lse[(int64_t{task.b} * c.q_heads + head) * c.q_len + r] =
            empty ? -INFINITY : lanes.top[l] * kLn2 + std::log(sum);
      }
    }
  }

  const PrefillCall& c;
  int lanes_max;
  Scratch memory;
  float *q, *out, *top, *total, *s, *k_copy, *v_copy;
  int32_t *runs, *row;
  int first_row = 0, rows = 0, used = 0;
  int32_t low = 0, high = 0;
  Segment segments[kChunk];
  Lanes tiles[512];
};

std::vector<Task> tasks_of(const PrefillCall& c) {
  const int group = c.q_heads / c.kv_heads;
  const int share = std::min(c.indices == nullptr ? group : c.q_heads / c.lists, group);
  const int fit = std::max(1, kState / (c.block_q * std::max(c.dim, c.v_dim)));
  const int heads = std::min(share, fit);
  std::vector<Task> tasks;
  for (int b = 0; b < c.batch; ++b)
    for (int h = 0; h < c.q_heads; h += share)
      for (int from = 0; from < share; from += heads)
        for (int t = c.first_tile; t < c.first_tile + c.tiles_q; ++t) {
          const int n = std::min(heads, share - from);
          int64_t work = t;
          if (c.indices != nullptr) {
            const int64_t at = h / (c.q_heads / c.lists);
            work = c.counts[b * c.counts_batch + at * c.counts_head + t];
          }
          tasks.push_back(Task{b, h + from, n, t, work * n});
        }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& x, const Task& y) { return x.work > y.work; });
  return tasks;
}

}  // namespace
}  // namespace foveate

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
