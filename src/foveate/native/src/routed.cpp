// The attention of prefill.cpp when query blocks are too small to fill the lanes: for each key
// block, the rows that read it are brought together.

#include <algorithm>
#include <vector>

#include "prefill.hpp"

namespace foveate {
namespace {

constexpr int kSpan = 2048;  // rows of a task

// Rows [first, end) of one head.
struct Span {
  int32_t b, head, first, end;
};

class Router {
 public:
  explicit Router(const PrefillCall& call)
      : c(call),
        space(call, kVectors * kWidth),
        sums(4 * size_t(kSpan) * (c.v_dim + 2)),
        starts((c.k_len + c.block_k - 1) / c.block_k + 1) {
    out = sums.as<float>();
    top = out + size_t(kSpan) * c.v_dim;
    total = top + kSpan;
  }

  void run(const Span& span) {
    const int rows = span.end - span.first;
    std::fill(out, out + size_t(rows) * c.v_dim, 0.0f);
    std::fill(top, top + rows, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    sort(span);
    for (size_t j = 0; j + 1 < starts.size(); ++j)
      for (int64_t at = starts[j]; at < starts[j + 1]; at += kVectors * kWidth)
        meet(span, int32_t(j), &entries[at],
             int(std::min<int64_t>(starts[j + 1] - at, kVectors * kWidth)));
    for (int i = 0; i < rows; ++i)
      settle(c, out + size_t(i) * c.v_dim, 1, top[i], total[i], span.b, span.head, span.first + i);
  }

 private:
  List list(const Span& span, int row) const {
    return list_of(c, span.b, span.head, (row + c.lead) / c.block_q);
  }

  // Rows by the key blocks they read: block j has entries [starts[j], starts[j + 1]).
  void sort(const Span& span) {
    std::fill(starts.begin(), starts.end(), 0);
    for (int row = span.first; row < span.end; ++row) {
      const List l = list(span, row);
      for (int64_t i = 0; i < l.blocks; ++i) ++starts[l.indices[i] + 1];
    }
    for (size_t j = 1; j < starts.size(); ++j) starts[j] += starts[j - 1];
    entries.resize(starts.back());
    next.assign(starts.begin(), starts.end());
    for (int row = span.first; row < span.end; ++row) {
      const List l = list(span, row);
      for (int64_t i = 0; i < l.blocks; ++i) entries[next[l.indices[i]]++] = row;
    }
  }

  // Some rows meet key block j.
  void meet(const Span& span, int32_t j, const int32_t* rows, int count) {
    Lanes t;
    space.place(c, t, 0, int(padded(count)) / kWidth);
    clear(c, t);
    const int n = t.vectors * kWidth;
    for (int l = 0; l < n; ++l) {
      const int row = rows[std::min(l, count - 1)], at = row - span.first;
      seat(c, t, l, span.b, span.head, row);
      t.top[l] = top[at];
      t.total[l] = total[at];
      for (int d = 0; d < c.v_dim; ++d) t.out[d * n + l] = out[size_t(at) * c.v_dim + d];
    }
    const int32_t end = std::min((j + 1) * c.block_k, c.k_len);
    const int64_t kv = span.head / (c.q_heads / c.kv_heads);
    for (int32_t at = j * c.block_k; at < end; at += chunk_keys(c)) {
      space.add(c, span.b, kv, at, std::min(end - at, chunk_keys(c)), nullptr);
      advance(c, space, &t, 1);
    }
    for (int l = 0; l < count; ++l) {
      const int at = rows[l] - span.first;
      top[at] = t.top[l];
      total[at] = t.total[l];
      for (int d = 0; d < c.v_dim; ++d) out[size_t(at) * c.v_dim + d] = t.out[d * n + l];
    }
  }

  const PrefillCall& c;
  Workspace space;
  Scratch sums;
  float *out, *top, *total;  // of the rows of a span
  std::vector<int64_t> starts, next;
  std::vector<int32_t> entries;
};

}  // namespace
}  // namespace foveate

FOVEATE_EXPORT int32_t foveate_routed(const foveate::PrefillCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const PrefillCall& c) {
    std::vector<Span> spans;
    // Later rows may have longer lists: they go first.
    for (int end = c.q_len; end > 0; end -= std::min(end, kSpan))
      for (int b = 0; b < c.batch; ++b)
        for (int h = 0; h < c.q_heads; ++h)
          spans.push_back(Span{b, h, std::max(0, end - kSpan), end});
    const bool ok = parallel_tasks(c.threads, spans.size(), [&](auto&& next) {
      Router router(c);
      for (int64_t i; next(i);) router.run(spans[i]);
    });
    return ok ? kDone : kNoMemory;
  });
}
