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

constexpr int kChunk = 64;       // most keys of a chunk
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
  // The masks of the keys of entry i, from its key `from` on; null: none.
  const uint8_t* mask(const PrefillCall& c, int64_t i, int64_t from) const {
    if (tiles == nullptr || tiles[i] < 0) return nullptr;
    return c.tiles + (int64_t{tiles[i]} * c.block_k + from) * c.block_q;
  }
};

inline List list_of(const PrefillCall& c, int64_t b, int head, int64_t block) {
  if (c.indices == nullptr) return {nullptr, nullptr, (c.k_len + c.block_k - 1) / c.block_k};
  const int64_t h = head / (c.q_heads / c.lists), at = block * c.width;
  const int32_t* tiles = c.tile_of;
  if (tiles != nullptr) tiles += b * c.tile_batch + h * c.tile_head + at;
  return {c.indices + b * c.indices_batch + h * c.indices_head + at, tiles,
          c.counts[b * c.counts_batch + h * c.counts_head + block]};
}

// Keys, ascending, that some tiles of queries meet together.
struct Chunk {
  int32_t* key;           // (count)
  const float** k;        // their rows in float32
  const float** v;
  const uint8_t** mask;   // by row of the query block, 1 = visible; null: no mask
  int count;
  bool masked;            // whether any has a mask
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

// Sets scores s (end - from, lanes) of keys that a lane does not see to -inf.
template <int N>
void hide(const PrefillCall& c, const Lanes& lanes, const Chunk& chunk, int from, int end,
          float* s) {
  const IntVec none = splat(int32_t{0});
  for (int j = from; j < end; ++j, s += N * kWidth) {
    const IntVec key = splat(chunk.key[j]);
    for (int n = 0; n < N; ++n) {
      IntVec seen = none;
      for (int r = 0; r < c.run_count; ++r) {
        const int32_t* run = lanes.runs + r * 2 * N * kWidth + n * kWidth;
        seen |= (key >= load_int(run)) & (key < load_int(run + N * kWidth));
      }
      store(s + n * kWidth, seen ? load(s + n * kWidth) : splat(-INFINITY));
    }
    if (chunk.mask[j] == nullptr) continue;
    for (int l = 0; l < N * kWidth; ++l)
      if (!chunk.mask[j][lanes.row[l]]) s[l] = -INFINITY;
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
    Vec total = splat(0.0f);
    for (int j = 0; j < count; ++j) {
      const Vec p = exp2_of(load(at + j * N * kWidth) - base);
      store(at + j * N * kWidth, p);
      total += p;
    }
    store(lanes.top + n * kWidth, top);
    float* sum = lanes.total + n * kWidth;
    store(sum, load(sum) * shrink + total);
    if (any(top != before))
      for (int d = 0; d < c.v_dim; ++d) {
        float* o = lanes.out + (d * N + n) * kWidth;
        store(o, load(o) * shrink);
      }
  }
}

// The part [from, end) of a chunk beyond which no lane sees a key, and whether all lanes see it all.
struct Part {
  int from, end;
  bool whole;
};

inline Part part_of(const PrefillCall& c, const Lanes& lanes, const Chunk& chunk) {
  const int32_t first = chunk.key[0], last = chunk.key[chunk.count - 1];
  int32_t low = last + 1, high = first;
  for (int r = 0; r < c.run_count; ++r) {
    const int32_t a = std::max(lanes.low[r], first), z = std::min(lanes.high[r], last + 1);
    if (a >= z) continue;
    low = std::min(low, a);
    high = std::max(high, z);
  }
  if (low >= high) return {0, 0, false};
  int32_t* const stop = chunk.key + chunk.count;
  Part part{int(std::lower_bound(chunk.key, stop, low) - chunk.key),
            int(std::lower_bound(chunk.key, stop, high) - chunk.key), false};
  for (int r = 0; r < c.run_count && part.from < part.end; ++r)
    part.whole |= lanes.inner[r] <= chunk.key[part.from] && chunk.key[part.end - 1] < lanes.outer[r];
  part.whole &= !chunk.masked;
  return part;
}

template <int N>
void step(const PrefillCall& c, Lanes& lanes, const Chunk& chunk, float* s) {
  const Part part = part_of(c, lanes, chunk);
  const int count = part.end - part.from;
  if (count <= 0) return;
  scores<N>(lanes.q, chunk.k + part.from, count, c.dim, s);
  if (c.softcap > 0) {
    const float cap = c.softcap * kLog2e;
    for (int j = 0; j < count * N; ++j)
      store(s + j * kWidth, cap * tanh_of(load(s + j * kWidth) * (1.0f / cap)));
  }
  if (!part.whole) hide<N>(c, lanes, chunk, part.from, part.end, s);
  if (c.skip_rows > 0 && !wanted<N>(c, lanes, count, s)) return;
  softmax<N>(c, lanes, count, s);
  values<N>(s, chunk.v + part.from, count, c.v_dim, lanes.out);
}

// Memory of some lane tiles and of one chunk; `lanes` is the number of lanes of all tiles.
class Workspace {
 public:
  Workspace(const PrefillCall& c, int lanes)
      : memory_(4 * (size_t(lanes) * (c.dim + c.v_dim + 3 + 2 * c.run_count) +
                     chunk_keys(c) * (size_t{kVectors} * kWidth + c.dim + c.v_dim + 1)) +
                chunk_keys(c) * 3 * sizeof(void*)) {
    const size_t keys = chunk_keys(c);
    const auto rows = memory_.as<const float*>();
    chunk.k = rows;
    chunk.v = rows + keys;
    chunk.mask = reinterpret_cast<const uint8_t**>(rows + 2 * keys);
    float* at = reinterpret_cast<float*>(rows + 3 * keys);
    const auto take = [&at](size_t count) { return std::exchange(at, at + count); };
    scores = take(keys * kVectors * kWidth);
    k_copy = take(keys * c.dim);
    v_copy = take(keys * c.v_dim);
    chunk.key = reinterpret_cast<int32_t*>(take(keys));
    lanes_from = at;
    clear();
  }

  void clear() {
    chunk.count = 0;
    chunk.masked = false;
  }

  // Adds `count` keys of batch row `b` and kv head `kv`; `mask` holds their masks, or is null.
  void add(const PrefillCall& c, int64_t b, int64_t kv, int32_t start, int count,
           const uint8_t* mask) {
    for (int32_t key = start; key < start + count; ++key) {
      const int i = chunk.count++;
      chunk.key[i] = key;
      chunk.k[i] = row(c.k, c, b, kv, key, c.dim, k_copy + size_t(i) * c.dim);
      chunk.v[i] = row(c.v, c, b, kv, key, c.v_dim, v_copy + size_t(i) * c.v_dim);
      chunk.mask[i] = mask;
      if (mask != nullptr) mask += c.block_q;
    }
    chunk.masked |= mask != nullptr;
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

  float* scores;
  Chunk chunk;

 private:
  // A row in float32: where it lies, or a copy.
  static const float* row(const Tensor& x, const PrefillCall& c, int64_t b, int64_t kv, int32_t key,
                          int32_t dim, float* copy) {
    const int64_t at = b * x.batch + kv * x.head + key * x.row;
    if (c.dtype == kFloat32) return static_cast<const float*>(x.data) + at;
    numbers(x, c.dtype, at, dim, copy);
    return copy;
  }

  Scratch memory_;
  float *k_copy, *v_copy, *lanes_from;
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

// All tiles meet the chunk of the workspace.
inline void advance(const PrefillCall& c, Workspace& space, Lanes* tiles, int count) {
  for (int t = 0; t < count && space.chunk.count > 0; ++t) {
    Lanes& lanes = tiles[t];
    if (lanes.vectors == 3) step<3>(c, lanes, space.chunk, space.scores);
    if (lanes.vectors == 2) step<2>(c, lanes, space.chunk, space.scores);
    if (lanes.vectors == 1) step<1>(c, lanes, space.chunk, space.scores);
  }
  space.clear();
}

}  // namespace foveate
