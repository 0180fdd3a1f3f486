// Linear recurrences, token by token: S = a S + k uᵀ, out = qᵀ S.
//
// The columns of a state (value channels) do not depend on each other. It is cut into slices of
// columns that stay in the nearest cache, where a token costs three multiply-adds for each number
// of the state (four under the delta rule) for every kind of decay. Chunked forms cost about as
// many, plus what they do within a chunk.

#include <algorithm>
#include <cmath>

#include "abi.hpp"
#include "numbers.hpp"
#include "runtime.hpp"
#include "simd.hpp"

namespace foveate {

// Mirrors _Call in scan.py.
struct ScanCall {
  Tensor q, k, v, out;
  Tensor decay;          // float32 log-decays (batch, kv_heads, length, channels); null: none
  Tensor beta;           // float32 (batch, kv_heads, length, 1); null: not the delta rule
  const uint8_t* valid;  // (batch, length); null: every token
  float* state;          // (batch, kv_heads, key_dim, value_dim), read and written
  int32_t batch, q_heads, kv_heads, length, key_dim, value_dim;
  int32_t side, dtype, threads;
  float scale;
};

namespace {

enum Side : int32_t { kWhole = 0, kKeys = 1, kValues = 2 };

constexpr int kTile = 16;                 // tokens that are laid out at a time
constexpr int64_t kSliceBytes = 24 << 10;  // of a state, to stay in a cache of 32 KB

// out = xᵀ S for a slice S (count, N vectors); count % 8 == 0.
template <int N>
inline void read(const float* s, const float* x, int count, Vec* out) {
  constexpr int kRows = 8 / N;  // sums enough to hide the latency of an addition
  Vec sums[kRows][N] = {};
  for (int r = 0; r < count; r += kRows) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = splat(x[r + i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] += factor * load(s + ((r + i) * N + n) * kWidth);
    }
  }
  for (int n = 0; n < N; ++n) {
    out[n] = sums[0][n];
    for (int i = 1; i < kRows; ++i) out[n] += sums[i][n];
  }
}

// S = a S + k uᵀ, then out = qᵀ S; a is a number for each row of S (every `stride` floats), or one
// for each column.
template <int N, bool kByColumn>
inline void step(float* s, const float* k, const float* q, const float* keep, int stride,
                 const Vec* u, int count, Vec* out) {
  constexpr int kRows = 4 / N;
  Vec sums[kRows][N] = {}, columns[N], added[N];
  for (int n = 0; n < N; ++n) {
    added[n] = u[n];
    columns[n] = kByColumn ? load(keep + n * kWidth) : Vec{};
  }
  for (int r = 0; r < count; r += kRows) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec key = splat(k[r + i]), query = splat(q[r + i]);
      const Vec row = kByColumn ? Vec{} : splat(keep[(r + i) * stride]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = s + ((r + i) * N + n) * kWidth;
        const Vec next = (kByColumn ? columns[n] : row) * load(at) + key * added[n];
        store(at, next);
        sums[i][n] += query * next;
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    out[n] = sums[0][n];
    for (int i = 1; i < kRows; ++i) out[n] += sums[i][n];
  }
}

// How the work is cut: slices of `vectors` vectors of columns; `parts` tasks for each state.
struct Plan {
  int vectors, slices, parts;

  explicit Plan(const ScanCall& c) : vectors(4) {
    const int64_t states = int64_t{c.batch} * c.kv_heads;
    const auto cut = [&] { slices = (c.value_dim + lanes() - 1) / lanes(); };
    cut();
    while (vectors > 1 && (int64_t{c.key_dim} * lanes() * 4 > kSliceBytes ||
                           lanes() / 2 >= c.value_dim || states * slices < c.threads)) {
      vectors /= 2;
      cut();
    }
    // Some more tasks than threads, for an even end; what a part lays out, another does as well.
    parts = static_cast<int>(std::clamp<int64_t>(8 * c.threads / states, 1, slices));
  }
  int lanes() const { return vectors * kWidth; }
};

class Worker {
 public:
  Worker(const ScanCall& call, const Plan& plan)
      : c(call),
        plan(plan),
        group(c.q_heads / c.kv_heads),
        keys(static_cast<int>(padded(c.key_dim))),
        columns(plan.slices * plan.lanes()),
        memory(4 * floats()) {
    float* at = memory.as<float>();
    std::fill(at, at + floats(), 0.0f);
    const auto take = [&at](int64_t count) { return std::exchange(at, at + count); };
    state = take(int64_t{c.key_dim} * columns);
    k = take(kTile * keys);
    decayed_k = take(kTile * keys);
    keep = take(kTile * std::max(keys, columns));
    beta = take(kTile);
    v = take(kTile * columns);
    q = take(group * kTile * keys);
    out = take(group * kTile * columns);
  }

  void run(int64_t task) {
    const int64_t pair = task / plan.parts, part = task % plan.parts;
    b = static_cast<int>(pair / c.kv_heads);
    h = static_cast<int>(pair % c.kv_heads);
    first = static_cast<int>(plan.slices * part / plan.parts);
    last = static_cast<int>(plan.slices * (part + 1) / plan.parts);
    low = first * plan.lanes();
    high = std::min(last * plan.lanes(), c.value_dim);
    float* home = c.state + pair * c.key_dim * c.value_dim;
    each_row([&](int r, int column, int count, float* at) {
      std::copy_n(home + int64_t{r} * c.value_dim + column, count, at);
    });
    for (int t = 0; t < c.length; t += kTile) {
      lay_out(t, std::min(t + kTile, c.length));
      for (int slice = first; slice < last; ++slice) {
        if (plan.vectors == 4) walk<4>(slice);
        if (plan.vectors == 2) walk<2>(slice);
        if (plan.vectors == 1) walk<1>(slice);
      }
      for (int g = 0; g < group; ++g)
        for (int i = 0; i < tokens; ++i) put_row(g, token[i], out + (g * kTile + i) * columns);
    }
    each_row([&](int r, int column, int count, const float* at) {
      std::copy_n(at, count, home + int64_t{r} * c.value_dim + column);
    });
  }

 private:
  int64_t floats() const {
    const int64_t per_token = 2 * keys + std::max(keys, columns) + 1 + columns;
    return int64_t{c.key_dim} * columns + kTile * (per_token + group * (keys + columns));
  }

  // Every row of every slice of the task: its first column, the columns it has, where it lies.
  template <class Row>
  void each_row(Row&& row) {
    for (int slice = first; slice < last; ++slice)
      for (int r = 0; r < c.key_dim; ++r) {
        const int lanes = plan.lanes(), column = slice * lanes;
        row(r, column, std::min(lanes, c.value_dim - column), slice_of(slice) + r * lanes);
      }
  }
  float* slice_of(int slice) const { return state + int64_t{slice} * c.key_dim * plan.lanes(); }

  int64_t row_of(const Tensor& x, int64_t head, int64_t t) const {
    return b * x.batch + head * x.head + t * x.row;
  }

  // The valid ones of some tokens in float32; the others get their zeros.
  void lay_out(int from, int end) {
    tokens = 0;
    for (int t = from; t < end; ++t) {
      if (c.valid == nullptr || c.valid[int64_t{b} * c.length + t]) {
        token[tokens++] = t;
      } else {
        std::fill_n(out, columns, 0.0f);
        for (int g = 0; g < group; ++g) put_row(g, t, out);
      }
    }
    for (int i = 0; i < tokens; ++i) {
      const int64_t t = token[i];
      numbers(c.k, c.dtype, row_of(c.k, h, t), c.key_dim, k + i * keys);
      numbers(c.v, c.dtype, row_of(c.v, h, t), c.value_dim, v + i * columns);
      for (int g = 0; g < group; ++g) {
        float* at = q + (g * kTile + i) * keys;
        numbers(c.q, c.dtype, row_of(c.q, h * group + g, t), c.key_dim, at);
        for (int d = 0; d < keys; d += kWidth) store(at + d, load(at + d) * c.scale);
      }
      lay_out_decay(i, t);
    }
  }

  void lay_out_decay(int i, int64_t t) {
    const int width = keep_width();
    float* kept = keep + i * width;
    const int count = c.side == kWhole ? 1 : c.side == kKeys ? c.key_dim : c.value_dim;
    if (c.decay.data == nullptr) {
      *kept = 1.0f;
    } else {
      numbers(c.decay, kFloat32, row_of(c.decay, h, t), count, kept);
      std::fill(kept + count, kept + width, 0.0f);
      for (int d = 0; d < width; d += kWidth) store(kept + d, exp2_of(load(kept + d) * kLog2e));
    }
    if (c.beta.data == nullptr) return;
    beta[i] = number(c.beta, kFloat32, row_of(c.beta, h, t));
    const int stride = keep_stride();
    const float* key = k + i * keys;
    for (int d = 0; d < c.key_dim; ++d) decayed_k[i * keys + d] = key[d] * kept[d * stride];
  }
  int keep_width() const { return c.side == kWhole ? kWidth : c.side == kKeys ? keys : columns; }
  int keep_stride() const { return c.side == kKeys ? 1 : 0; }

  template <int N>
  void walk(int slice) {
    float* s = slice_of(slice);
    const int column = slice * plan.lanes();
    for (int i = 0; i < tokens; ++i) {
      Vec u[N], o[N];
      for (int n = 0; n < N; ++n) u[n] = load(v + i * columns + column + n * kWidth);
      if (c.beta.data != nullptr) {
        Vec known[N];
        read<N>(s, decayed_k + i * keys, c.key_dim, known);
        for (int n = 0; n < N; ++n) u[n] = beta[i] * (u[n] - known[n]);
      }
      const float *key = k + i * keys, *query = q + i * keys, *kept = keep + i * keep_width();
      if (c.side == kValues)
        step<N, true>(s, key, query, kept + column, 0, u, c.key_dim, o);
      else
        step<N, false>(s, key, query, kept, keep_stride(), u, c.key_dim, o);
      for (int g = 0; g < group; ++g) {
        if (g > 0) read<N>(s, query + g * kTile * keys, c.key_dim, o);
        for (int n = 0; n < N; ++n)
          store(out + (g * kTile + i) * columns + column + n * kWidth, o[n]);
      }
    }
  }

  // The columns of this task in the row of a token.
  void put_row(int g, int64_t t, const float* from) {
    const int64_t at = row_of(c.out, h * group + g, t);
    for (int d = low; d < high; ++d) put(c.out, c.dtype, at + d, from[d]);
  }

  const ScanCall& c;
  const Plan plan;
  const int group, keys, columns;
  Scratch memory;
  float *state, *k, *decayed_k, *keep, *beta, *v, *q, *out;
  int b, h, first, last, low, high;
  int tokens, token[kTile];
};

int32_t run_scan(const ScanCall& c) {
  const Plan plan(c);
  const int64_t tasks = int64_t{c.batch} * c.kv_heads * plan.parts;
  const bool ok = parallel_tasks(c.threads, tasks, [&](auto next) {
    Worker worker(c, plan);
    for (int64_t task; next(task);) worker.run(task);
  });
  return ok ? kDone : kNoMemory;
}

}  // namespace
}  // namespace foveate

FOVEATE_EXPORT int32_t foveate_scan(const foveate::ScanCall* call, int64_t size) {
  return foveate::guarded(call, size, foveate::run_scan);
}
