// Keys and values in floating point, in a row or listed, as a Source of decode.hpp.
#pragma once

#include <algorithm>

#include "decode.hpp"

namespace foveate {

// Mirrors DecodeCall in decode.py.
struct DecodeCall {
  Queries queries;
  Tensor k, v;
  const int32_t* lists;  // null: every row reads the keys in a row
  const uint8_t* valid;  // like lists: which entries count; null: all
  int64_t lists_batch, lists_head, lists_row;  // strides of both; 0 broadcasts
  int32_t list_heads, list_rows;               // lists there are: 1, kv_heads or q_heads; 1 or q_len
  int32_t entries, width;                      // of a list; keys of an entry
};

constexpr int kStep = 16;  // keys whose values all rows pass over before the next keys' do
constexpr int kStrip = 4;  // vectors of channels that are summed apart, to hide latency

// Keys or values of a chunk; what is no whole vector of float32 is copied.
class Rows {
 public:
  Rows(const Tensor& x, const Queries& c, int32_t dim)
      : stride(padded(dim)),
        x(x),
        dim(dim),
        dtype(c.dtype),
        copies(c.dtype != kFloat32 || dim % kWidth != 0),
        memory(copies ? size_t(kChunk) * stride * 4 : 0) {
    if (copies) std::fill(memory.as<float>(), memory.as<float>() + kChunk * stride, 0.0f);
  }

  void begin(int64_t b, int64_t head) { base = b * x.batch + head * x.head; }

  void place(const int64_t* keys, int32_t count) {
    if (copies) {
      for (int32_t i = 0; i < count; ++i) {
        float* copy = memory.as<float>() + i * stride;
        numbers(x, dtype, base + keys[i] * x.row, dim, copy);
        at[i] = copy;
      }
    } else {
      const float* data = static_cast<const float*>(x.data) + base;
      for (int32_t i = 0; i < count; ++i) at[i] = data + keys[i] * x.row;
    }
    // The last vector of logits is read whole. Further rows are only asked for ahead of time: those
    // of the next chunk, where keys lie in a row.
    const int32_t read = static_cast<int32_t>(padded(count));
    std::fill(at + count, at + read, at[count - 1]);
    for (int32_t i = read; i < read + kStep; ++i)
      at[i] = copies ? at[count - 1] : at[count - 1] + (i - count + 1) * x.row;
  }

  const float* at[kChunk + kStep];
  const int64_t stride;  // of q or out: whole vectors

 private:
  const Tensor& x;
  int32_t dim, dtype;
  bool copies;
  Scratch memory;
  int64_t base = 0;
};

// Keys and values in floating point.
class FloatSource {
 public:
  explicit FloatSource(const DecodeCall& call)
      : call(call), c(call.queries), k(call.k, c, c.dim), v(call.v, c, c.v_dim) {}

  void begin(const Task& task, const float* queries) {
    q = queries;
    const bool by_query_head = call.lists != nullptr && call.list_heads == c.q_heads;
    const int64_t kv = by_query_head ? task.lane / (c.q_heads / c.kv_heads) : task.lane;
    k.begin(task.b, kv);
    v.begin(task.b, kv);
    list = task.b * call.lists_batch + task.lane * call.lists_head + task.list * call.lists_row;
  }

  int32_t load(const Task&, int64_t from, int32_t count) {
    int64_t keys[kChunk];
    int32_t found = 0;
    if (call.lists == nullptr) {
      for (; found < count; ++found) keys[found] = from + found;
    } else {
      int64_t entry = list + from / call.width;
      int32_t at = static_cast<int32_t>(from % call.width);
      for (int32_t i = 0; i < count; ++i) {
        const int64_t key = int64_t{call.lists[entry]} * call.width + at;
        if (key < c.k_len && (call.valid == nullptr || call.valid[entry])) keys[found++] = key;
        if (++at == call.width) at = 0, ++entry;
      }
    }
    if (found == 0) return 0;
    k.place(keys, found);
    v.place(keys, found);
    return found;
  }

  void logits(const Tile& t) {
    if (t.rows == 1) return logits_of<1>(t);
    if (t.rows == 2) return logits_of<2>(t);
    if (t.rows == 3) return logits_of<3>(t);
    return logits_of<4>(t);
  }

  // Some keys at a time pass by all rows. A row meets only keys that it sees: a value may be NaN.
  void values(const Tile& t) {
    for (int32_t from = 0; from < t.count; from += kStep)
      for (int32_t r = 0; r < t.rows; ++r) {
        const int32_t low = std::max(from, t.low[r]), high = std::min(from + kStep, t.high[r]);
        values_of(t.s + r * kChunk, low, high, t.out + r * v.stride, r == 0);
      }
  }

 private:
  // Keys are read one after the other, as they lie in memory.
  template <int R>
  void logits_of(const Tile& t) {
    for (int32_t j = 0; j < t.count; j += kWidth) {
      Vec sums[R][kWidth];
      for (int i = 0; i < kWidth; ++i) {
        for (int64_t d = 0; d < k.stride; d += 16)
          __builtin_prefetch(k.at[j + i + kStep] + d);
        Vec acc[kStrip][R] = {};
        int64_t d = 0;
        for (; d + kStrip * kWidth <= k.stride; d += kStrip * kWidth)
          products<R, kStrip>(k.at[j + i] + d, q + t.first * k.stride + d, acc);
        for (; d < k.stride; d += kWidth)
          products<R, 1>(k.at[j + i] + d, q + t.first * k.stride + d, acc);
        for (int r = 0; r < R; ++r)
          sums[r][i] = (acc[0][r] + acc[1][r]) + (acc[2][r] + acc[3][r]);
      }
      for (int r = 0; r < R; ++r) store(t.s + r * kChunk + j, sum_each(sums[r]));
    }
  }

  // Adds N vectors of a key times those of R rows.
  template <int R, int N>
  void products(const float* key, const float* rows, Vec (&acc)[kStrip][R]) const {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Vec x = foveate::load(key + n * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[n][r] += x * foveate::load(rows + r * k.stride + n * kWidth);
    }
  }

  // Adds the keys [from, to) to a row; `ahead` asks for the next keys as well.
  void values_of(const float* p, int32_t from, int32_t to, float* out, bool ahead) const {
    int64_t d = 0;
    for (; d + 2 * kStrip * kWidth <= v.stride; d += 2 * kStrip * kWidth)
      strip<2 * kStrip>(p, from, to, d, out + d, ahead);
    for (; d + kStrip * kWidth <= v.stride; d += kStrip * kWidth)
      strip<kStrip>(p, from, to, d, out + d, ahead);
    for (; d < v.stride; d += kWidth) strip<1>(p, from, to, d, out + d, ahead);
  }

  template <int N>
  void strip(const float* p, int32_t from, int32_t to, int64_t d, float* out, bool ahead) const {
    Vec acc[N];
    for (int n = 0; n < N; ++n) acc[n] = foveate::load(out + n * kWidth);
    for (int32_t j = from; j < to; ++j) {
      const Vec weight = splat(p[j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if (ahead && n * kWidth % 16 == 0)
          __builtin_prefetch(v.at[j + kStep] + d + n * kWidth);
        acc[n] += weight * foveate::load(v.at[j] + d + n * kWidth);
      }
    }
    for (int n = 0; n < N; ++n) store(out + n * kWidth, acc[n]);
  }

  const DecodeCall& call;
  const Queries& c;
  Rows k, v;
  const float* q = nullptr;
  int64_t list = 0;
};

}  // namespace foveate
