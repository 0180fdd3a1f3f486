// Few queries that read many keys: the work cut into tasks, the running softmax of the rows of a
// task, and the merging of what several tasks found for one row. A Source hands over keys and
// values: it is the only part that knows how they are stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.hpp"
#include "runtime.hpp"
#include "simd.hpp"

namespace foveate {

constexpr int kChunk = 256;     // keys between two updates of the running maximum
constexpr int kPiece = 1024;    // keys of a task, where there are few tasks
constexpr int kFewTasks = 64;   // so many tasks are enough for any number of threads
constexpr int kTaskRows = 32;   // rows of a task
constexpr int kTileRows = 4;    // rows that share what is loaded of a key

// Mirrors QueryArg in decode.py.
struct Queries {
  Tensor q, out;
  float* lse;           // (batch, q_heads, q_len), contiguous
  const int32_t* runs;  // the run [first, end) of keys that a row sees; null: all of them
  int64_t runs_batch, runs_head;  // strides; 0 broadcasts
  int32_t batch, q_heads, kv_heads, q_len, k_len, dim, v_dim;
  int32_t dtype, threads;
  float scale, softcap;  // softcap 0: none
};

// One list of keys, or a piece of it, and some of the rows that read it.
struct Task {
  int32_t b, lane, list, first_row, rows, piece;
  int64_t from, to;
};

// A lane is what has keys or lists of its own, a kv head or a query head; it has one list for all
// queries or one for each.
struct Grid {
  Grid(const Queries& c, int32_t lanes, int32_t lists, int64_t keys, int64_t border = 0)
      : lanes(lanes),
        lists(lists),
        keys(keys),
        border(border),
        queries(lists == 1 ? c.q_len : 1) {
    rows = c.q_heads / lanes * queries;
    blocks = (rows + kTaskRows - 1) / kTaskRows;
    const int64_t tasks = int64_t{c.batch} * lanes * lists * blocks;
    pieces = tasks < kFewTasks ? std::max<int64_t>(1, (keys + kPiece - 1) / kPiece) : 1;
    count = tasks * pieces;
  }

  Task at(int64_t i) const {
    Task t;
    t.piece = static_cast<int32_t>(i % pieces);
    i /= pieces;
    t.first_row = static_cast<int32_t>(i % blocks) * kTaskRows;
    t.rows = std::min(kTaskRows, rows - t.first_row);
    i /= blocks;
    t.list = static_cast<int32_t>(i % lists);
    i /= lists;
    t.lane = static_cast<int32_t>(i % lanes);
    t.b = static_cast<int32_t>(i / lanes);
    t.from = pieces == 1 ? 0 : int64_t{t.piece} * kPiece;
    t.to = pieces == 1 ? keys : std::min(keys, t.from + kPiece);
    return t;
  }

  int32_t lanes, lists;
  int64_t keys;     // positions of a list
  int64_t border;   // no chunk of keys crosses this position
  int32_t queries;  // that share a list
  int32_t rows, blocks;
  int64_t pieces, count;
};

// What a Source works on: a few rows and the keys of a chunk.
struct Tile {
  int32_t first, rows;      // of the task
  int32_t count;            // keys
  float* s;                 // (rows, kChunk): logits, then weights, which are 0 for unseen keys
  float* out;               // (rows, padded v_dim): sums of weighted values
  const int32_t *low, *high;  // a row sees the keys [low, high) of the chunk
};

// Result of a row over some keys: maximum and sum of its weights, and its sums of values.
struct Part {
  float top, total;
  const float* out;
};

inline void emit(const Queries& c, int64_t b, int64_t head, int64_t row, const Part* parts,
                 int64_t count) {
  float top = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < count; ++i) top = parts[i].top > top ? parts[i].top : top;
  const float base = top == -INFINITY ? 0.0f : top;
  std::vector<float> weight(count);
  for (int64_t i = 0; i < count; ++i) {
    weight[i] = std::exp2(parts[i].top - base);
    total += weight[i] * parts[i].total;
  }
  const bool empty = total == 0.0f;
  const int64_t to = b * c.out.batch + head * c.out.head + row * c.out.row;
  for (int d = 0; d < c.v_dim; ++d) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += weight[i] * parts[i].out[d];
    put(c.out, c.dtype, to + d, empty ? 0.0f : sum / total);
  }
  c.lse[(b * c.q_heads + head) * c.q_len + row] =
      empty ? -INFINITY : top * kLn2 + std::log(total);
}

// Parts of all rows, or nothing where no list is cut: then tasks emit their rows themselves.
class Parts {
 public:
  Parts(const Queries& c, const Grid& grid)
      : c(c),
        pieces(grid.pieces),
        stride(padded(c.v_dim) + kWidth),
        memory(pieces == 1 ? 0 : size_t(c.batch) * c.q_heads * c.q_len * pieces * stride * 4) {}

  void keep(int64_t b, int64_t head, int64_t row, int64_t piece, const Part& part) {
    if (pieces == 1) return emit(c, b, head, row, &part, 1);
    float* at = slot((b * c.q_heads + head) * c.q_len + row, piece);
    std::copy(part.out, part.out + c.v_dim, at);
    at[stride - 2] = part.top;
    at[stride - 1] = part.total;
  }

  // False without memory.
  bool merge() {
    if (pieces == 1) return true;
    const int64_t heads = int64_t{c.batch} * c.q_heads;
    return parallel_tasks(c.threads, heads, [&](auto&& next) {
      std::vector<Part> parts(pieces);
      for (int64_t i; next(i);)
        for (int64_t row = 0; row < c.q_len; ++row) {
          for (int64_t p = 0; p < pieces; ++p) {
            const float* at = slot(i * c.q_len + row, p);
            parts[p] = Part{at[stride - 2], at[stride - 1], at};
          }
          emit(c, i / c.q_heads, i % c.q_heads, row, parts.data(), pieces);
        }
    });
  }

 private:
  float* slot(int64_t row, int64_t piece) {
    return memory.as<float>() + (row * pieces + piece) * stride;
  }

  const Queries& c;
  int64_t pieces, stride;
  Scratch memory;
};

// One thread's work. A Source has
//   begin(task, q)           q (rows, padded dim), scaled by scale * log2(e)
//   load(task, from, count)  -> keys found at these positions of the list, at most count
//   logits(tile)             writes tile.s for all keys; lanes past the last key may hold anything
//   values(tile)             adds weighted values to tile.out
template <class Source>
class Decoder {
 public:
  Decoder(const Queries& c, const Grid& grid, Parts& parts, Source& source)
      : c(c),
        grid(grid),
        parts(parts),
        source(source),
        q_stride(padded(c.dim)),
        v_stride(padded(c.v_dim)),
        memory(size_t(kTaskRows) * (q_stride + v_stride) * 4) {
    q = memory.as<float>();
    out = q + kTaskRows * q_stride;
  }

  void run(const Task& task) {
    start(task);
    source.begin(task, q);
    for (int64_t at = task.from, end; at < task.to; at = end) {
      end = std::min(at + kChunk, task.to);
      if (at < grid.border && end > grid.border) end = grid.border;
      const int32_t span = static_cast<int32_t>(end - at);
      if (!see(task, at, span)) continue;
      const int32_t count = source.load(task, at, span);
      if (count == 0) continue;
      for (int32_t first = 0; first < task.rows; first += kTileRows) {
        const int32_t rows = std::min(kTileRows, task.rows - first);
        Tile tile{first, rows, count, s, out + first * v_stride, low, high};
        if (c.runs == nullptr) std::fill(high, high + rows, count);
        else tile.low += first, tile.high += first;
        source.logits(tile);
        for (int32_t r = 0; r < rows; ++r) softmax(tile, r);
        source.values(tile);
      }
    }
    for (int32_t r = 0; r < task.rows; ++r)
      parts.keep(task.b, head_of(task, r), row_of(task, r), task.piece,
                 Part{top[r], sum_lanes(load(total + r * kWidth)), out + r * v_stride});
  }

 private:
  int32_t head_of(const Task& t, int32_t r) const {
    return t.lane * (c.q_heads / grid.lanes) + (t.first_row + r) / grid.queries;
  }
  int32_t row_of(const Task& t, int32_t r) const {
    return t.list * grid.queries + (t.first_row + r) % grid.queries;
  }

  void start(const Task& task) {
    std::fill(q, q + task.rows * q_stride, 0.0f);
    std::fill(out, out + task.rows * v_stride, 0.0f);
    std::fill(top, top + task.rows, -INFINITY);
    std::fill(total, total + task.rows * kWidth, 0.0f);
    std::fill(low, low + task.rows, 0);
    const float factor = c.scale * kLog2e;
    for (int32_t r = 0; r < task.rows; ++r) {
      const int64_t head = head_of(task, r), row = row_of(task, r);
      float* to = q + r * q_stride;
      numbers(c.q, c.dtype, task.b * c.q.batch + head * c.q.head + row * c.q.row, c.dim, to);
      for (int d = 0; d < c.dim; ++d) to[d] *= factor;
      if (c.runs == nullptr) continue;
      const int32_t* run = c.runs + task.b * c.runs_batch + head * c.runs_head + row * 2;
      first_key[r] = run[0];
      end_key[r] = run[1];
    }
  }

  // Finds what each row sees of the keys [at, at + span); false when no row sees any.
  bool see(const Task& task, int64_t at, int32_t span) {
    if (c.runs == nullptr) return true;
    bool any = false;
    for (int32_t r = 0; r < task.rows; ++r) {
      low[r] = static_cast<int32_t>(std::clamp<int64_t>(first_key[r] - at, 0, span));
      high[r] = static_cast<int32_t>(std::clamp<int64_t>(end_key[r] - at, low[r], span));
      any |= low[r] < high[r];
    }
    return any;
  }

  // Logits of a row of the tile become weights, on top of what the row has seen before.
  void softmax(const Tile& tile, int32_t r) {
    float* row = tile.s + r * kChunk;
    const int32_t end = static_cast<int32_t>(padded(tile.count));
    if (c.softcap > 0) {
      const float cap = c.softcap * kLog2e;
      for (int32_t j = 0; j < end; j += kWidth)
        store(row + j, cap * tanh_of(load(row + j) * (1.0f / cap)));
    }
    std::fill(row, row + tile.low[r], -INFINITY);
    std::fill(row + tile.high[r], row + end, -INFINITY);
    Vec most = splat(-INFINITY);
    for (int32_t j = 0; j < end; j += kWidth) {
      const Vec x = load(row + j);
      most = x > most ? x : most;
    }
    float& before = top[tile.first + r];
    const float now = std::max(before, max_lane(most));
    const float base = now == -INFINITY ? 0.0f : now;
    Vec sum = load(total + (tile.first + r) * kWidth);
    if (now != before) {
      const Vec shrink = exp2_of(splat(before - base));
      sum *= shrink;
      float* o = tile.out + r * v_stride;
      for (int64_t d = 0; d < v_stride; d += kWidth) store(o + d, load(o + d) * shrink);
      before = now;
    }
    for (int32_t j = 0; j < end; j += kWidth) {
      const Vec p = exp2_of(load(row + j) - base);
      store(row + j, p);
      sum += p;
    }
    store(total + (tile.first + r) * kWidth, sum);
  }

  const Queries& c;
  const Grid& grid;
  Parts& parts;
  Source& source;
  int64_t q_stride, v_stride;
  Scratch memory;
  float *q, *out;
  alignas(64) float s[kTileRows * kChunk];
  float top[kTaskRows], total[kTaskRows * kWidth];  // lanes of total are summed at the end
  int32_t low[kTaskRows], high[kTaskRows];
  int32_t first_key[kTaskRows], end_key[kTaskRows];
};

// Runs all tasks of a call, with a Source for each thread made by make_source().
template <class MakeSource>
int32_t decode_all(const Queries& c, const Grid& grid, MakeSource&& make_source) {
  Parts parts(c, grid);
  const bool ok = parallel_tasks(c.threads, grid.count, [&](auto&& next) {
    auto source = make_source();
    Decoder<decltype(source)> decoder(c, grid, parts, source);
    for (int64_t i; next(i);) decoder.run(grid.at(i));
  });
  return ok && parts.merge() ? kDone : kNoMemory;
}

}  // namespace foveate
