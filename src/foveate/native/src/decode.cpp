// Exact softmax attention of one or few queries over keys that lie in a row, or are listed.

#include "decode.hpp"

#include <cstring>

#include "abi.hpp"

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

namespace {

constexpr int kStep = 16;  // keys whose values all channels pass over before the next keys' do

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
    for (int32_t i = read; i < count + kStep; ++i)
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
    if (t.rows == 1) return logits_of<1, 4>(t);
    if (t.rows == 2) return logits_of<2, 4>(t);
    if (t.rows == 3) return logits_of<3, 4>(t);
    return logits_of<4, 2>(t);
  }

  void values(const Tile& t) {
    // Keys that all rows see; the others are left to the rows that do, as a value may be NaN.
    int32_t from = 0, to = t.count;
    for (int32_t r = 0; r < t.rows; ++r) {
      from = std::max(from, t.low[r]);
      to = std::min(to, t.high[r]);
    }
    if (from >= to) from = to = t.count;
    for (int32_t r = 0; r < t.rows; ++r) {
      values_of<1, 8>(t.s + r * kChunk, t.low[r], std::min(from, t.high[r]), t.out + r * v.stride);
      values_of<1, 8>(t.s + r * kChunk, std::max(to, t.low[r]), t.high[r], t.out + r * v.stride);
    }
    if (t.rows == 1) return values_of<1, 8>(t.s, from, to, t.out);
    if (t.rows == 2) return values_of<2, 4>(t.s, from, to, t.out);
    if (t.rows == 3) return values_of<3, 4>(t.s, from, to, t.out);
    return values_of<4, 2>(t.s, from, to, t.out);
  }

 private:
  template <int R, int K>
  void logits_of(const Tile& t) {
    const float* rows = q + t.first * k.stride;
    for (int32_t j = 0; j < t.count; j += kWidth) {
      Vec sums[R][kWidth];
      for (int i = 0; i < kWidth; i += K) {
        Vec acc[K][R] = {};
        for (int64_t d = 0; d < k.stride; d += kWidth) {
#pragma GCC unroll 4
          for (int n = 0; n < K; ++n) {
            const Vec key = foveate::load(k.at[j + i + n] + d);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[n][r] += key * foveate::load(rows + r * k.stride + d);
          }
        }
        for (int n = 0; n < K; ++n)
          for (int r = 0; r < R; ++r) sums[r][i + n] = acc[n][r];
      }
      for (int r = 0; r < R; ++r) store(t.s + r * kChunk + j, sum_each(sums[r]));
    }
  }

  // Adds the keys [from, to) to R rows, N vectors of channels at a time.
  template <int R, int N>
  void values_of(const float* p, int32_t from, int32_t to, float* out) {
    for (int32_t end; from < to; from = end) {
      end = std::min(from + kStep, to);
      int64_t d = 0;
      for (; d + N * kWidth <= v.stride; d += N * kWidth) strip<R, N>(p, from, end, d, out + d);
      for (; d < v.stride; d += kWidth) strip<R, 1>(p, from, end, d, out + d);
    }
  }

  template <int R, int N>
  void strip(const float* p, int32_t from, int32_t to, int64_t d, float* out) {
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) acc[r][n] = foveate::load(out + r * v.stride + n * kWidth);
    for (int32_t j = from; j < to; ++j) {
      const float* at = v.at[j] + d;
      Vec weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = splat(p[r * kChunk + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if (n * kWidth % 16 == 0) __builtin_prefetch(v.at[j + kStep] + d + n * kWidth);
        const Vec value = foveate::load(at + n * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][n] += weight[r] * value;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store(out + r * v.stride + n * kWidth, acc[r][n]);
  }

  const DecodeCall& call;
  const Queries& c;
  Rows k, v;
  const float* q = nullptr;
  int64_t list = 0;
};

}  // namespace
}  // namespace foveate

FOVEATE_EXPORT int32_t foveate_decode(const foveate::DecodeCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const DecodeCall& call) {
    const Queries& c = call.queries;
    const bool listed = call.lists != nullptr;
    const int32_t lanes = listed && call.list_heads > 1 ? call.list_heads : c.kv_heads;
    const int64_t keys = listed ? int64_t{call.entries} * call.width : c.k_len;
    const Grid grid(c, lanes, listed ? call.list_rows : 1, keys);
    return decode_all(c, grid, [&] { return FloatSource(call); });
  });
}
