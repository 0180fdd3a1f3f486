// Codes of quantised keys or values with their scales and zeros, and numbers as words.
#pragma once

#include <algorithm>
#include <cstring>

#include "decode.hpp"
#include "words.hpp"

namespace foveate {

// Mirrors PackedArg in quantized.py.
struct Packed {
  Tensor codes, scale, zero;          // uint8, bfloat16, int16
  int32_t bits, tokens, channels;     // of a group: 1 token or 1 channel
};

// The codes of a chunk, packed as they are, with the scales of their groups. Plane p of a row is
// what the bits from p * bits of its bytes hold: channels p * bytes and up. A group is some whole
// planes or a part of one.
class Codes {
 public:
  Codes(const Packed& packed, int32_t dim)
      : packed(packed),
        per_token(packed.tokens == 1),
        groups(per_token ? dim / packed.channels : 1),
        width(dim / groups),
        bytes(dim * packed.bits / 8),
        pitch((bytes + kWords - 1) / kWords * kWords),
        planes(std::max(width / bytes, 1)),
        factors(per_token ? int64_t{groups} * kChunk : padded(dim) + kWords),
        memory(size_t(factors) * 8 + (whole() ? 0 : size_t(kChunk) * pitch)) {
    scale = memory.as<float>();
    shift = scale + factors;
    copies = reinterpret_cast<uint8_t*>(shift + factors);
    std::fill(scale, shift + factors, 0.0f);
    if (!whole()) std::fill(copies, copies + kChunk * pitch, uint8_t{0});
  }

  // Whether rows are whole vectors of bytes.
  bool whole() const { return pitch == bytes; }

  // Room for a number for each code of a row.
  int64_t stride() const { return int64_t{8 / packed.bits} * pitch; }

  int32_t first_plane(int g) const { return g * width / bytes; }
  int32_t first_byte(int g) const { return g * width % bytes; }
  int32_t end_byte(int g) const {
    return planes > 1 || width == bytes ? pitch : first_byte(g) + width;
  }

  void begin(int64_t b, int64_t head) {
    base = b * packed.codes.batch + head * packed.codes.head;
    scale_base = b * packed.scale.batch + head * packed.scale.head;
    zero_base = b * packed.zero.batch + head * packed.zero.head;
  }

  // Turns to the chunk [from, from + count). Rows that are not whole vectors are copied.
  void turn_to(int64_t from, int32_t count) {
    const int64_t step = packed.codes.row;
    const uint8_t* rows = static_cast<const uint8_t*>(packed.codes.data) + base + from * step;
    for (int32_t j = 0; j < count; ++j) {
      row[j] = whole() ? rows + j * step : copies + j * pitch;
      if (!whole()) std::memcpy(copies + j * pitch, rows + j * step, bytes);
    }
    std::fill(row + count, row + count + kWidth, row[count - 1]);
    next_chunk = whole() ? kChunk * step : 0;
  }

  const uint8_t* row[kChunk + kWidth];  // of a key; past the last one that one again
  int64_t next_chunk = 0;               // bytes to the row of the same key of the next chunk

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
  int32_t groups, width;          // of a row; channels of a group
  int32_t bytes, pitch, planes;   // of a row; whole vectors of them; of a group
  float *scale, *shift;

 private:
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
  uint8_t* copies;
};

// Writes x (count) as words in steps of the result, none larger than `most`.
inline float to_words(const float* x, int32_t count, float most, int16_t* words) {
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

}  // namespace foveate
