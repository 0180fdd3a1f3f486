// One step of online softmax attention: a tile of queries meets a chunk of keys.
//
// Queries lie across the lanes of a vector: scores are held as (key, query), so maxima and sums
// over keys need no shuffles, and keys and values are read in place, one broadcast number at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "abi.hpp"
#include "numbers.hpp"
#include "runtime.hpp"
#include "simd.hpp"
#include "tiles.hpp"

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
  int32_t skip_rows;  // rows that skip a block together, 0: none skips
  float scale, softcap;  // softcap 0: none
  float skip;            // how far below the running maximum a block must stay, natural log
};

constexpr int kChunk = 64;       // most keys, and so segments, of a chunk
constexpr int kState = 1 << 15;  // numbers of queries that a task keeps at hand
constexpr int kMaxRuns = 4;

// Keys of a chunk: so few that they stay in a fast cache while all lanes pass over them. What is
// skipped is skipped as a whole.
inline int chunk_keys(const PrefillCall& c) {
  return c.skip_rows > 0 ? c.block_k : std::clamp(8192 / c.dim, 16, kChunk);
}

// The key blocks that a query block of a head reads.
struct List {
  const int32_t *indices, *tiles;  // null: all of them; no masks
  int64_t blocks;
  int32_t tile(int64_t i) const { return tiles == nullptr ? -1 : tiles[i]; }
};

inline List list_of(const PrefillCall& c, int64_t b, int head, int64_t block) {
  if (c.indices == nullptr) return {nullptr, nullptr, (c.k_len + c.block_k - 1) / c.block_k};
  const int64_t h = head / (c.q_heads / c.lists), at = block * c.width;
  const int32_t* tiles = c.tile_of;
  if (tiles != nullptr) tiles += b * c.tile_batch + h * c.tile_head + at;
  return {c.indices + b * c.indices_batch + h * c.indices_head + at, tiles,
          c.counts[b * c.counts_batch + h * c.counts_head + block]};
}

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
  int32_t* runs;  // (run_count, 2, lanes)
  int32_t* row;   // (lanes): row of the query block
  int32_t vectors;
  int32_t low[kMaxRuns], high[kMaxRuns];    // hull of the lanes' runs
  int32_t inner[kMaxRuns], outer[kMaxRuns];  // keys that all lanes see: [inner, outer)
};

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
        if (!tile[lanes.row[l]]) s[j * N * kWidth + l] = -INFINITY;
    }
  }
}

// Hides a block from the groups of lanes in which it stays far below the running maximum of every
// row. False when none is left.
template <int N>
bool wanted(const PrefillCall& c, const Lanes& lanes, int count, float* s) {
  constexpr int kLanes = N * kWidth;
  float gap[kLanes];
  for (int n = 0; n < N; ++n) {
    Vec local = splat(-INFINITY);
    for (int j = 0; j < count; ++j) {
      const Vec x = load(s + (j * N + n) * kWidth);
      local = (x > local) | (x != x) ? x : local;  // NaN stays, and so does its block
    }
    const Vec none = splat(-INFINITY);
    store(gap + n * kWidth, local == none ? none : local - load(lanes.top + n * kWidth));
  }
  bool some = false;
  for (int from = 0; from < kLanes; from += c.skip_rows) {
    const int end = std::min(from + c.skip_rows, kLanes);
    bool stays = false;
    for (int l = from; l < end; ++l) stays |= !(gap[l] <= -c.skip * kLog2e);
    some |= stays;
    if (stays) continue;
    for (int j = 0; j < count; ++j)
      std::fill(s + j * kLanes + from, s + j * kLanes + end, -INFINITY);
  }
  return some;
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
    if (any(top != before))
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
      const int a = std::max(lanes.low[r], seg.start);
      const int z = std::min(lanes.high[r], seg.start + seg.count);
      if (a >= z) continue;
      low = std::min(low, a);
      high = std::max(high, z);
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
  if (c.skip_rows > 0 && !wanted<N>(c, lanes, keys, s)) return;
  softmax<N>(c, lanes, keys, s);
  keys = 0;
  for (int i = 0; i < used; ++i) {
    const Staged& at = staged[which[i]];
    values<N>(s + keys * N * kWidth, at.v + from[i] * at.v_stride, at.v_stride, length[i], c.v_dim,
              lanes.out);
    keys += length[i];
  }
}

// Memory of some lane tiles and of one chunk; `lanes` is the number of lanes of all tiles.
class Workspace {
 public:
  Workspace(const PrefillCall& c, int lanes)
      : memory_(4 * (size_t(lanes) * (c.dim + c.v_dim + 3 + 2 * c.run_count) +
                     chunk_keys(c) * (size_t{kVectors} * kWidth + c.dim + c.v_dim))) {
    float* at = memory_.as<float>();
    const auto take = [&at](size_t count) { return std::exchange(at, at + count); };
    scores = take(size_t(chunk_keys(c)) * kVectors * kWidth);
    k_copy = take(size_t(chunk_keys(c)) * c.dim);
    v_copy = take(size_t(chunk_keys(c)) * c.v_dim);
    lanes_from = at;
  }

  // The memory of a tile of `vectors` vectors behind `lane` lanes of other tiles.
  void place(const PrefillCall& c, Lanes& t, int lane, int vectors) const {
    const int n = vectors * kWidth;
    float* at = lanes_from + size_t(lane) * (c.dim + c.v_dim + 3 + 2 * c.run_count);
    const auto take = [&at](size_t count) { return std::exchange(at, at + count); };
    t.vectors = vectors;
    t.q = take(size_t(n) * c.dim);
    t.out = take(size_t(n) * c.v_dim);
    t.top = take(n);
    t.total = take(n);
    t.row = reinterpret_cast<int32_t*>(take(n));
    t.runs = reinterpret_cast<int32_t*>(take(size_t(n) * 2 * c.run_count));
    for (int r = 0; r < c.run_count; ++r) {
      t.low[r] = t.outer[r] = c.k_len;
      t.high[r] = t.inner[r] = 0;
    }
  }

  float *scores, *k_copy, *v_copy;

 private:
  Scratch memory_;
  float* lanes_from;
};

// Puts a query and its runs into a lane; its softmax is left as it is.
inline void seat(const PrefillCall& c, Lanes& t, int lane, int b, int head, int row) {
  const int n = t.vectors * kWidth;
  const float factor = c.scale * kLog2e;
  const int64_t from = b * c.q.batch + head * c.q.head + row * c.q.row;
  for (int d = 0; d < c.dim; ++d) t.q[d * n + lane] = number(c.q, c.dtype, from + d) * factor;
  t.row[lane] = (row + c.lead) % c.block_q;
  const int32_t* run = c.runs + b * c.runs_batch + head * c.runs_head;
  run += int64_t{row} * c.run_count * 2;
  for (int r = 0; r < c.run_count; ++r) {
    const int32_t a = std::max(run[2 * r], 0), z = std::min(run[2 * r + 1], c.k_len);
    t.runs[2 * r * n + lane] = a;
    t.runs[(2 * r + 1) * n + lane] = z;
    t.inner[r] = std::max(t.inner[r], a);
    t.outer[r] = std::min(t.outer[r], z);
    if (a >= z) continue;
    t.low[r] = std::min(t.low[r], a);
    t.high[r] = std::max(t.high[r], z);
  }
}

// Nothing seen yet, in all lanes.
inline void clear(const PrefillCall& c, Lanes& t) {
  const int n = t.vectors * kWidth;
  std::fill(t.out, t.out + n * c.v_dim, 0.0f);
  std::fill(t.top, t.top + n, -INFINITY);
  std::fill(t.total, t.total + n, 0.0f);
}

// Writes the result of one row, whose sums lie `stride` apart.
inline void settle(const PrefillCall& c, const float* sums, int64_t stride, float top, float total,
                   int b, int head, int row) {
  // A total of NaN is not empty: NaN scores never became the maximum.
  const bool empty = top == -INFINITY && total == total;
  const float inverse = empty ? 0.0f : 1.0f / total;
  const int64_t to = b * c.out.batch + head * c.out.head + row * c.out.row;
  for (int d = 0; d < c.v_dim; ++d)
    put(c.out, c.dtype, to + d, empty ? 0.0f : sums[d * stride] * inverse);
  c.lse[(int64_t{b} * c.q_heads + head) * c.q_len + row] =
      empty ? -INFINITY : top * kLn2 + std::log(total);
}

// All tiles meet a chunk of keys, given by segments, of batch row `b` and kv head `kv`.
inline void advance(const PrefillCall& c, const Workspace& space, Lanes* tiles, int tile_count,
                    const Segment* segments, int count, int b, int64_t kv) {
  Staged staged[kChunk];
  int copied = 0;
  for (int i = 0; i < count; ++i) {
    const Segment& seg = segments[i];
    const int64_t k_at = b * c.k.batch + kv * c.k.head + seg.start * c.k.row;
    const int64_t v_at = b * c.v.batch + kv * c.v.head + seg.start * c.v.row;
    if (c.dtype == kFloat32) {
      staged[i] = Staged{static_cast<const float*>(c.k.data) + k_at,
                         static_cast<const float*>(c.v.data) + v_at, c.k.row, c.v.row};
      continue;
    }
    staged[i] = Staged{space.k_copy + copied * c.dim, space.v_copy + copied * c.v_dim, c.dim,
                       c.v_dim};
    for (int j = 0; j < seg.count; ++j, ++copied) {
      numbers(c.k, c.dtype, k_at + j * c.k.row, c.dim, space.k_copy + copied * c.dim);
      numbers(c.v, c.dtype, v_at + j * c.v.row, c.v_dim, space.v_copy + copied * c.v_dim);
    }
  }
  for (int t = 0; t < tile_count; ++t) {
    Lanes& lanes = tiles[t];
    if (lanes.vectors == 3) step<3>(c, lanes, segments, staged, count, space.scores);
    if (lanes.vectors == 2) step<2>(c, lanes, segments, staged, count, space.scores);
    if (lanes.vectors == 1) step<1>(c, lanes, segments, staged, count, space.scores);
  }
}

}  // namespace foveate
