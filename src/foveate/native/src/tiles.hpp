// Products of small matrices whose columns are queries: (count, lanes) scores and (dim, lanes) sums.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace foveate {

// Rows of a register tile (numbers that are broadcast) and its vectors of lanes. Together with the
// operands they fill the registers of the instruction set.
#if defined(__AVX512F__)
constexpr int kBroadcasts = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kBroadcasts = 4, kVectors = 3;
#else
constexpr int kBroadcasts = 4, kVectors = 2;
#endif

// Vectors of the next tile when `left` are to come. A lone vector at the end would be slow: two
// pairs are better than three and one.
inline int vectors_of(int left) {
  if (left == kVectors + 1 && kVectors > 2) return 2;
  return left < kVectors ? left : kVectors;
}

template <int K, int N>
inline void scores_tile(const float* q, const float* const* rows, int dim, float* s) {
  const float* key[K];
  for (int i = 0; i < K; ++i) key[i] = rows[i];
  Vec acc[K][N] = {};
  for (int d = 0; d < dim; ++d) {
    Vec lane[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) lane[n] = load(q + (int64_t{d} * N + n) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Vec number = splat(key[i][d]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] += number * lane[n];
    }
  }
  for (int i = 0; i < K; ++i)
    for (int n = 0; n < N; ++n) store(s + (i * N + n) * kWidth, acc[i][n]);
}

// s (count, lanes) = key rows (count, dim) times q (dim, lanes).
template <int N>
void scores(const float* q, const float* const* rows, int count, int dim, float* s) {
  int i = 0;
  for (; i + kBroadcasts <= count; i += kBroadcasts)
    scores_tile<kBroadcasts, N>(q, rows + i, dim, s + i * N * kWidth);
  for (; i < count; ++i) scores_tile<1, N>(q, rows + i, dim, s + i * N * kWidth);
}

template <int K, int N>
inline void values_tile(const float* p, const float* const* rows, int from, int count, float* out) {
  // Summed apart first: a long sum rounds away what comes late, if it comes one by one.
  Vec acc[K][N] = {};
  for (int j = 0; j < count; ++j) {
    const float* row = rows[j] + from;
    Vec lane[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) lane[n] = load(p + (j * N + n) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Vec number = splat(row[i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] += number * lane[n];
    }
  }
  for (int i = 0; i < K; ++i)
    for (int n = 0; n < N; ++n) {
      float* sum = out + (i * N + n) * kWidth;
      store(sum, load(sum) + acc[i][n]);
    }
}

// out (dim, lanes) += value rows (count, dim) transposed times p (count, lanes); dim % 8 == 0.
template <int N>
void values(const float* p, const float* const* rows, int count, int dim, float* out) {
  for (int i = 0; i < dim; i += kBroadcasts)
    values_tile<kBroadcasts, N>(p, rows, i, count, out + i * N * kWidth);
}

}  // namespace foveate
