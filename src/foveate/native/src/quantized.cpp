// Softmax attention of few queries straight from the codes of quantised keys and values.
//
// A value is scale (code - zero). Codes meet queries and weights as whole numbers of 16 bits, whose
// rounding errors are at most 2^-16 of the largest; scales, and what zeros take away, are float32:
//   logit = scale (sum of q code - zero sum of q),
//   out = sum of (weight scale) code - sum of weight scale zero.
// Where a group is one channel of many tokens, q times the channels' scales takes the place of q.

#include <cstring>

#include "abi.hpp"
#include "decode.hpp"
#include "words.hpp"

namespace foveate {

// Mirrors PackedArg in quantized.py.
struct Packed {
  Tensor codes, scale, zero;          // uint8, bfloat16, int16
  int32_t bits, tokens, channels;     // of a group: 1 token or 1 channel
};

// Mirrors QuantizedCall in quantized.py.
struct QuantizedCall {
  Queries queries;
  Packed k, v;
};

namespace {

constexpr float kLargest = 32767.0f;

// Codes of a chunk with the scales of their groups.
class Codes {
 public:
  Codes(const Packed& packed, int32_t dim)
      : packed(packed),
        per_token(packed.tokens == 1),
        groups(per_token ? dim / packed.channels : 1),
        width(dim / groups),
        stride((dim + kWords - 1) / kWords * kWords),
        bytes(dim * packed.bits / 8),
        factors(per_token ? int64_t{groups} * kChunk : padded(dim)),
        memory(size_t(kChunk) * stride * 2 + size_t(factors) * 8) {
    scale = memory.as<float>();
    shift = scale + factors;
    codes = reinterpret_cast<int16_t*>(shift + factors);
    std::fill(scale, shift + factors, 0.0f);
    std::fill(codes, codes + kChunk * stride, int16_t{0});
  }

  void begin(int64_t b, int64_t head) {
    base = b * packed.codes.batch + head * packed.codes.head;
    scale_base = b * packed.scale.batch + head * packed.scale.head;
    zero_base = b * packed.zero.batch + head * packed.zero.head;
  }

  // Reads tokens; in pairs they lie side by side.
  void spread(int64_t from, int32_t count, bool pairs) {
    if (packed.bits == 8) spread_as<8>(from, count, pairs);
    if (packed.bits == 4) spread_as<4>(from, count, pairs);
    if (packed.bits == 2) spread_as<2>(from, count, pairs);
  }

  // scale and scale * zero of every token: (groups, kChunk).
  void token_factors(int64_t from, int32_t count) {
    for (int g = 0; g < groups; ++g)
      factors_of(from, g, count, packed.scale.row, packed.zero.row, g * kChunk);
  }

  // scale and scale * zero of every channel, in the group of a token.
  void channel_factors(int64_t token, int32_t dim) {
    factors_of(token / packed.tokens, 0, dim, 1, 1, 0);
  }

  // Keys of the chunk [from, from + count) that share factors, from key `at` on.
  int32_t segment_end(int64_t from, int32_t at, int32_t count) const {
    if (per_token) return count;
    const int64_t next = ((from + at) / packed.tokens + 1) * packed.tokens;
    return static_cast<int32_t>(std::min<int64_t>(count, next - from));
  }

  const Packed& packed;
  bool per_token;
  int32_t groups, width;  // of a row; channels of a group
  int32_t stride, bytes;
  float *scale, *shift;
  int16_t* codes;

 private:
  template <int Bits>
  void spread_as(int64_t from, int32_t count, bool pairs) {
    const int64_t row = packed.codes.row;
    const uint8_t* at = static_cast<const uint8_t*>(packed.codes.data) + base + from * row;
    const auto read = pairs ? spread_pairs<Bits> : spread_rows<Bits>;
    read(at, row, count, bytes, codes, stride);
  }

  void factors_of(int64_t row, int64_t column, int32_t count, int64_t scale_step,
                  int64_t zero_step, int64_t to) {
    const uint16_t* s = static_cast<const uint16_t*>(packed.scale.data) + scale_base +
                        row * packed.scale.row + column;
    const int16_t* z = static_cast<const int16_t*>(packed.zero.data) + zero_base +
                       row * packed.zero.row + column;
    if (scale_step == 1 && zero_step == 1) return convert(s, z, 1, 1, count, to);
    convert(s, z, scale_step, zero_step, count, to);
  }

  // Inlined twice: steps of 1 are known to the compiler, which then uses vectors.
  __attribute__((always_inline)) void convert(const uint16_t* s, const int16_t* z, int64_t s_step,
                                              int64_t z_step, int32_t count, int64_t to) {
    float *__restrict scales = scale + to, *__restrict shifts = shift + to;
    for (int32_t i = 0; i < count; ++i) {
      scales[i] = of_bfloat16(s[i * s_step]);
      shifts[i] = scales[i] * static_cast<float>(z[i * z_step]);
    }
  }

  int64_t base = 0, scale_base = 0, zero_base = 0, factors;
  Scratch memory;
};

// Writes x (count) as words in steps of the result, none larger than `most`.
float to_words(const float* x, int32_t count, float most, int16_t* words) {
  Vec size = splat(0.0f);
  for (int32_t i = 0; i < count; i += kWidth) {
    const Vec at = load(x + i), positive = at < 0.0f ? -at : at;
    size = positive > size ? positive : size;
  }
  const float largest = max_lane(size);
  const float inverse = largest > 1e-33f ? most / largest : 0.0f;  // else it may be infinite
  for (int32_t i = 0; i < count; i += kWidth) store_words(words + i, load(x + i) * inverse);
  return largest / most;
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
        memory(size_t(kTaskRows) * (k.stride * 2 + k.groups * 8) + size_t(q_stride) * 4) {
    folded = memory.as<float>();
    step = folded + q_stride;
    offset = step + kTaskRows * k.groups;
    words = reinterpret_cast<int16_t*>(offset + kTaskRows * k.groups);
    std::fill(words, words + kTaskRows * k.stride, int16_t{0});
  }

  void begin(const Task& task, const float* queries) {
    q = queries;
    k.begin(task.b, task.lane);
    v.begin(task.b, task.lane);
    if (!k.per_token) return;
    for (int32_t r = 0; r < task.rows; ++r)
      for (int g = 0; g < k.groups; ++g) {
        const float* from = q + r * q_stride + g * k.width;
        step[r * k.groups + g] =
            to_words(from, k.width, q_most, words + r * k.stride + g * k.width);
        float sum = 0.0f;
        for (int i = 0; i < k.width; ++i) sum += from[i];
        offset[r * k.groups + g] = sum;
      }
  }

  int32_t load(const Task&, int64_t from, int32_t count) {
    start = from;
    k.spread(from, count, false);
    v.spread(from, count, true);
    if (k.per_token) k.token_factors(from, count);
    if (v.per_token) v.token_factors(from, count);
    return count;
  }

  void logits(const Tile& t) {
    for (int32_t at = 0, end; at < t.count; at = end) {
      end = k.segment_end(start, at, t.count);
      if (!k.per_token) fold(t, at);
      if (t.rows == 1) logits_of<1, 4>(t, at, end);
      if (t.rows == 2) logits_of<2, 4>(t, at, end);
      if (t.rows == 3) logits_of<3, 4>(t, at, end);
      if (t.rows == 4) logits_of<4, 2>(t, at, end);
    }
  }

  void values(const Tile& t) {
    for (int32_t at = 0, end; at < t.count; at = end) {
      end = v.segment_end(start, at, t.count);
      if (!v.per_token) v.channel_factors(start + at, c.v_dim);
      for (int g = 0; g < v.groups; ++g) {
        for (int32_t r = 0; r < t.rows; ++r) weigh(t, r, g, at, end);
        if (t.rows == 1) values_of<1, 4>(t, g, at, end);
        if (t.rows == 2) values_of<2, 4>(t, g, at, end);
        if (t.rows == 3) values_of<3, 2>(t, g, at, end);
        if (t.rows == 4) values_of<4, 2>(t, g, at, end);
      }
    }
  }

 private:
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
      step[r] = to_words(folded, c.dim, q_most, words + r * k.stride);
      offset[r] = sum_lanes(sum);
    }
  }

  // Logits of the keys [from, to), `from` a multiple of kWidth.
  template <int R, int K>
  void logits_of(const Tile& t, int32_t from, int32_t to) {
    for (int32_t j = from; j < to; j += kWidth)
      for (int g = 0; g < k.groups; ++g) {
        IntVec sums[R][kWidth];
        for (int i = 0; i < kWidth; i += K) products<R, K>(t, j + i, g, &sums[0][i]);
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

  // Sums of products of K keys and R rows over the channels of a group, not yet across lanes.
  template <int R, int K>
  void products(const Tile& t, int32_t key, int g, IntVec* sums) const {
    IntVec acc[K][R] = {};
    const int16_t* codes = k.codes + key * k.stride;
    const int16_t* rows = words + t.first * k.stride;
    for (int32_t d = g * k.width; d < (g + 1) * k.width; d += kWords) {
#pragma GCC unroll 4
      for (int n = 0; n < K; ++n) {
        const Words code = load_words(codes + n * k.stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          acc[n][r] += pair_products(code, load_words(rows + r * k.stride + d));
      }
    }
    for (int n = 0; n < K; ++n)
      for (int r = 0; r < R; ++r) sums[r * kWidth + n] = acc[n][r];
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

  template <int R, int N>
  void values_of(const Tile& t, int g, int32_t from, int32_t to) {
    int32_t d = g * v.width;
    const int32_t end = d + v.width;
    for (; d + N * kWidth <= end; d += N * kWidth) strip<R, N>(t, from, to, d);
    for (; d < end; d += kWidth) strip<R, 1>(t, from, to, d);
  }

  // Adds the keys [from, to) to N vectors of channels of R rows.
  template <int R, int N>
  void strip(const Tile& t, int32_t from, int32_t to, int32_t d) {
    IntVec acc[R][N] = {};
    for (int32_t j = from; j < to; j += 2) {
      const int16_t* at = v.codes + j * v.stride + 2 * d;
      Words weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, weights[r] + j, 4);
        weight[r] = (Words)splat(pair);
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Words code = load_words(at + n * kWords);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][n] += pair_products(code, weight[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) add(t, r, d + n * kWidth, acc[r][n]);
  }

  void add(const Tile& t, int r, int32_t d, IntVec products) const {
    float* out = t.out + r * padded(c.v_dim) + d;
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
  int16_t* words;                 // queries (rows, k.stride)
  int64_t start = 0;
  alignas(64) int16_t weights[kTileRows][kChunk];
  float weight_step[kTileRows], weight_taken[kTileRows];
};

}  // namespace
}  // namespace foveate

FOVEATE_EXPORT int32_t foveate_quantized(const foveate::QuantizedCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const QuantizedCall& call) {
    const Queries& c = call.queries;
    const Grid grid(c, c.kv_heads, 1, c.k_len);
    return decode_all(c, grid, [&] { return QuantizedSource(call); });
  });
}
