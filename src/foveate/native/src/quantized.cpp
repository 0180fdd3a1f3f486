// Softmax attention of few queries straight from the codes of quantised keys and values.
//
// A value is scale (code - zero). Codes meet queries and weights as whole numbers of 16 bits, whose
// rounding errors are at most 2^-16 of the largest; scales, and what zeros take away, are float32:
//   logit = scale (sum of q code - zero sum of q),
//   out = sum of (weight scale) code - sum of weight scale zero.
// Where a group is one channel of many tokens, q times the channels' scales takes the place of q.

#include <cstring>
#include <type_traits>

#include "abi.hpp"
#include "codes.hpp"
#include "float_source.hpp"
#include "words.hpp"

namespace foveate {

// Mirrors QuantizedCall in quantized.py.
struct QuantizedCall {
  Queries queries;
  Packed k, v;
  Tensor exact_k, exact_v;  // tokens in floating point that follow
  int32_t exact;            // their number
};

namespace {

constexpr float kLargest = 32767.0f;
static_assert(int64_t{kChunk} * 255 * 32767 < int64_t{1} << 31, "sums over a chunk fit 32 bits");

template <int N>
using Int = std::integral_constant<int, N>;

// Calls f with a width of codes, planes and rows that the compiler knows.
template <class F>
void with_constants(int bits, int planes, int rows, F&& f) {
  const auto by_rows = [&](auto b, auto p) {
    if (rows == 1) f(b, p, Int<1>{});
    if (rows == 2) f(b, p, Int<2>{});
    if (rows == 3) f(b, p, Int<3>{});
    if (rows == 4) f(b, p, Int<4>{});
  };
  if (bits == 8) by_rows(Int<8>{}, Int<1>{});
  if (bits == 4 && planes == 1) by_rows(Int<4>{}, Int<1>{});
  if (bits == 4 && planes == 2) by_rows(Int<4>{}, Int<2>{});
  if (bits == 2 && planes == 1) by_rows(Int<2>{}, Int<1>{});
  if (bits == 2 && planes == 2) by_rows(Int<2>{}, Int<2>{});
  if (bits == 2 && planes == 4) by_rows(Int<2>{}, Int<4>{});
}

class QuantizedSource {
 public:
  explicit QuantizedSource(const QuantizedCall& call)
      : c(call.queries),
        k(call.k, c.dim),
        v(call.v, c.v_dim),
        q_stride(padded(c.dim)),
        // Sums of products with codes fit 32 bits.
        q_most(std::min(kLargest, 2.147e9f / (k.width * float((1 << k.packed.bits) - 1)))),
        memory(size_t(kTaskRows) * (k.stride() * 2 + k.groups * 8) + size_t(q_stride) * 6 +
               size_t(v.whole() ? 0 : kTileRows * v.stride() * 4)) {
    folded = memory.as<float>();
    step = folded + q_stride;
    offset = step + kTaskRows * k.groups;
    sums = offset + kTaskRows * k.groups;
    words = reinterpret_cast<int16_t*>(sums + (v.whole() ? 0 : kTileRows * v.stride()));
    plain = words + kTaskRows * k.stride();
    std::fill(words, plain, int16_t{0});
  }

  void begin(const Task& task, const float* queries) {
    q = queries;
    k.begin(task.b, task.lane);
    v.begin(task.b, task.lane);
    if (!k.per_token) return;
    for (int32_t r = 0; r < task.rows; ++r) {
      for (int g = 0; g < k.groups; ++g) {
        const float* from = q + r * q_stride + g * k.width;
        step[r * k.groups + g] = to_words(from, k.width, q_most, plain + g * k.width);
        float sum = 0.0f;
        for (int i = 0; i < k.width; ++i) sum += from[i];
        offset[r * k.groups + g] = sum;
      }
      by_planes(r);
    }
  }

  int32_t load(const Task&, int64_t from, int32_t count) {
    start = from;
    k.turn_to(from, count);
    v.turn_to(from, count);
    if (k.per_token) k.token_factors(from, count);
    if (v.per_token) v.token_factors(from, count);
    return count;
  }

  void logits(const Tile& t) {
    with_constants(k.packed.bits, k.planes, t.rows, [&](auto bits, auto planes, auto rows) {
      for (int32_t at = 0, end; at < t.count; at = end) {
        end = k.segment_end(start, at, t.count);
        if (!k.per_token) fold(t, at);
        logits_of<bits, planes, rows>(t, at, end);
      }
    });
  }

  void values(const Tile& t) {
    Tile into = t;
    if (!v.whole()) {
      into.out = sums;
      std::fill(sums, sums + t.rows * v.stride(), 0.0f);
    }
    const int64_t out_stride = v.whole() ? padded(c.v_dim) : v.stride();
    // So many sums of each row stay in registers.
    const int planes = std::min(v.planes, t.rows > 2 ? 2 : 4);
    with_constants(v.packed.bits, planes, t.rows, [&](auto bits, auto planes, auto rows) {
      constexpr int positions = (rows > 2 ? 2 : 4) / planes;
      for (int32_t at = 0, end; at < t.count; at = end) {
        end = v.segment_end(start, at, t.count);
        if (!v.per_token) v.channel_factors(start + at, c.v_dim);
        for (int g = 0; g < v.groups; ++g) {
          for (int32_t r = 0; r < t.rows; ++r) weigh(t, r, g, at, end);
          const int32_t past = v.first_plane(g) + v.planes, stop = v.end_byte(g);
          for (int32_t p = v.first_plane(g); p < past; p += planes) {
            int32_t i = v.first_byte(g);
            for (; i + positions * kWidth <= stop; i += positions * kWidth)
              strip<bits, planes, rows, positions>(into, out_stride, at, end, p, i);
            for (; i < stop; i += kWidth)
              strip<bits, planes, rows, 1>(into, out_stride, at, end, p, i);
          }
        }
      }
    });
    if (!v.whole()) gather_sums(t);
  }

 private:
  // Words of a row from the order of channels to that of planes.
  void by_planes(int32_t r) {
    for (int p = 0; p < 8 / k.packed.bits; ++p)
      std::memcpy(words + r * k.stride() + p * k.pitch, plain + p * k.bytes, k.bytes * 2);
  }

  // The reverse for sums of values.
  void gather_sums(const Tile& t) const {
    for (int32_t r = 0; r < t.rows; ++r)
      for (int p = 0; p < 8 / v.packed.bits; ++p)
        for (int32_t i = 0; i < v.bytes; ++i)
          t.out[r * padded(c.v_dim) + p * v.bytes + i] += sums[r * v.stride() + p * v.pitch + i];
  }

  // Queries of the tile times the scales of the token group of a key.
  void fold(const Tile& t, int32_t at) {
    k.channel_factors(start + at, c.dim);
    for (int32_t r = t.first; r < t.first + t.rows; ++r) {
      const float* from = q + r * q_stride;
      Vec sum = splat(0.0f);
      for (int64_t d = 0; d < q_stride; d += kWidth) {
        const Vec x = foveate::load(from + d);
        store(folded + d, x * foveate::load(k.scale + d));
        sum += x * foveate::load(k.shift + d);
      }
      step[r] = to_words(folded, c.dim, q_most, plain);
      by_planes(r);
      offset[r] = sum_lanes(sum);
    }
  }

  // Logits of the keys [from, to), `from` a multiple of kWidth.
  template <int Bits, int Planes, int R>
  void logits_of(const Tile& t, int32_t from, int32_t to) {
    for (int g = 0; g < k.groups; ++g) {
      const int32_t plane = k.first_plane(g), first = k.first_byte(g), end = k.end_byte(g);
      for (int32_t j = from; j < to; j += kWidth) {
        IntVec sums[R][kWidth];
        products<Bits, Planes, R>(t, j, plane, first, end, sums);
        for (int r = 0; r < R; ++r) {
          const int at = (t.first + r) * k.groups + g;
          const Vec sum = __builtin_convertvector(sum_each(sums[r]), Vec) * step[at];
          float* s = t.s + r * kChunk + j;
          if (k.per_token) {
            const Vec x = sum * foveate::load(k.scale + g * kChunk + j) -
                          offset[at] * foveate::load(k.shift + g * kChunk + j);
            store(s, g == 0 ? x : foveate::load(s) + x);
          } else {
            store(s, sum - offset[at]);
          }
        }
      }
    }
  }

  // Sums of products of kWidth keys and R rows over the channels of a group, in the bytes
  // [first, end) of the planes from `plane` on; not yet across lanes.
  template <int Bits, int Planes, int R>
  void products(const Tile& t, int32_t key, int32_t plane, int32_t first, int32_t end,
                IntVec (&sums)[R][kWidth]) const {
    const int16_t* rows = words + t.first * k.stride() + plane * k.pitch;
    for (int n = 0; n < kWidth; n += 2) {
      IntVec acc[2][R] = {};
      const uint8_t* codes[2] = {k.row[key + n], k.row[key + n + 1]};
      for (int32_t i = first; i < end; i += kWords)
#pragma GCC unroll 2
        for (int m = 0; m < 2; ++m) {
          __builtin_prefetch(codes[m] + i + k.next_chunk);
          const Words bytes = from_plane<Bits, Planes>(load_bytes(codes[m] + i), plane);
#pragma GCC unroll 4
          for (int p = 0; p < Planes; ++p) {
            const Words code = codes_of<Bits>(bytes, p);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
              acc[m][r] += pair_products(code, load_words(rows + r * k.stride() + p * k.pitch + i));
          }
        }
#pragma GCC unroll 2
      for (int m = 0; m < 2; ++m)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][n + m] = acc[m][r];
    }
  }

  // Weights of a row for the keys [from, to) as words, with what zeros take away.
  void weigh(const Tile& t, int32_t r, int g, int32_t from, int32_t to) {
    alignas(64) float scaled[kChunk];
    const float* p = t.s + r * kChunk;
    Vec taken = splat(0.0f);
    for (int32_t j = from; j < to; j += kWidth) {
      const Vec weight = foveate::load(p + j);
      if (v.per_token) {
        // Unseen keys have weight 0, whatever their scale is.
        const Vec scale = foveate::load(v.scale + g * kChunk + j);
        const Vec shift = foveate::load(v.shift + g * kChunk + j);
        store(scaled + j, weight > 0.0f ? weight * scale : splat(0.0f));
        taken += weight > 0.0f ? weight * shift : splat(0.0f);
      } else {
        store(scaled + j, weight);
        taken += weight;
      }
    }
    weight_step[r] = to_words(scaled + from, to - from, kLargest, weights[r] + from);
    weight_taken[r] = sum_lanes(taken);
  }

  // Adds the keys [from, to) to channels of R rows: of each of the planes from `plane` on, N
  // vectors from byte i on.
  template <int Bits, int Planes, int R, int N>
  void strip(const Tile& t, int64_t out_stride, int32_t from, int32_t to, int32_t plane,
             int32_t i) const {
    IntVec acc[R][Planes][N] = {};
    for (int32_t j = from; j < to; j += 2) {
      const uint8_t *x = v.row[j] + i, *y = v.row[j + 1] + i;
      __builtin_prefetch(x + v.next_chunk);
      __builtin_prefetch(y + v.next_chunk);
      Words weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, weights[r] + j, 4);
        weight[r] = (Words)splat(pair);
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Words bytes =
            from_plane<Bits, Planes>(load_byte_pairs(x + n * kWidth, y + n * kWidth), plane);
#pragma GCC unroll 4
        for (int p = 0; p < Planes; ++p) {
          const Words code = codes_of<Bits>(bytes, p);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][p][n] += pair_products(code, weight[r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < Planes; ++p)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const int32_t at = i + n * kWidth;
          add(t.out + r * out_stride + (plane + p) * v.pitch + at, r,
              (plane + p) * v.bytes + at, acc[r][p][n]);
        }
  }

  // Adds weighted codes of the channels from d on, as values.
  void add(float* out, int r, int32_t d, IntVec products) const {
    const Vec sum = __builtin_convertvector(products, Vec) * weight_step[r];
    if (v.per_token) {
      store(out, foveate::load(out) + (sum - weight_taken[r]));
    } else if (weight_taken[r] != 0.0f) {
      store(out, foveate::load(out) + (sum * foveate::load(v.scale + d) -
                                       weight_taken[r] * foveate::load(v.shift + d)));
    }
  }

  const Queries& c;
  Codes k, v;
  int64_t q_stride;
  float q_most;
  Scratch memory;
  const float* q = nullptr;
  float *folded, *step, *offset;  // of a row and group: logits per unit, and q or q * scale * zero
  float* sums;                    // of values (rows, planes), where their rows are copied
  int16_t *words, *plain;         // queries (rows, planes); one of them in the order of channels
  int64_t start = 0;
  alignas(64) int16_t weights[kTileRows][kChunk];
  float weight_step[kTileRows], weight_taken[kTileRows];
};

// Codes up to a border, then tokens in floating point; no chunk has both.
class CacheSource {
 public:
  CacheSource(const QuantizedCall& call, const DecodeCall& tail, int64_t border)
      : codes(call), exact(tail), border(border) {}

  void begin(const Task& task, const float* queries) {
    codes.begin(task, queries);
    exact.begin(task, queries);
  }

  int32_t load(const Task& task, int64_t from, int32_t count) {
    coded = from < border;
    return coded ? codes.load(task, from, count) : exact.load(task, from - border, count);
  }

  void logits(const Tile& t) { coded ? codes.logits(t) : exact.logits(t); }
  void values(const Tile& t) { coded ? codes.values(t) : exact.values(t); }

 private:
  QuantizedSource codes;
  FloatSource exact;
  int64_t border;
  bool coded = true;
};

}  // namespace
}  // namespace foveate

FOVEATE_EXPORT int32_t foveate_quantized(const foveate::QuantizedCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const QuantizedCall& call) {
    const Queries& c = call.queries;
    const int64_t border = c.k_len - call.exact;
    const Grid grid(c, c.kv_heads, 1, c.k_len, border);
    if (call.exact == 0) return decode_all(c, grid, [&] { return QuantizedSource(call); });
    DecodeCall tail{};
    tail.queries = c;
    tail.k = call.exact_k;
    tail.v = call.exact_v;
    return decode_all(c, grid, [&] { return CacheSource(call, tail, border); });
  });
}
