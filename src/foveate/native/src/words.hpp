// Whole numbers of 16 bits: packed codes spread out to them, and their products summed in pairs.
#pragma once

#include "simd.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace foveate {

constexpr int kWords = 2 * kWidth;

typedef int16_t Words __attribute__((vector_size(kVectorBytes)));
typedef int16_t LooseWords __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef int16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef int16_t LooseHalfWords __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

inline Words load_words(const int16_t* p) { return *reinterpret_cast<const LooseWords*>(p); }

// Lane i is x[2 i] y[2 i] + x[2 i + 1] y[2 i + 1], in 32 bits.
inline IntVec pair_products(Words x, Words y) {
#if defined(__AVX512BW__)
  return (IntVec)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (IntVec)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
  return (IntVec)_mm_madd_epi16((__m128i)x, (__m128i)y);
#else
  const IntVec a = (IntVec)x, b = (IntVec)y;
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Rounds numbers within ±32767 to words.
inline void store_words(int16_t* p, Vec x) {
  const Vec half = x < 0.0f ? splat(-0.5f) : splat(0.5f);
  const IntVec whole = __builtin_convertvector(x + half, IntVec);
  *reinterpret_cast<LooseHalfWords*>(p) = __builtin_convertvector(whole, HalfWords);
}

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t LooseBytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t Spread __attribute__((vector_size(32)));  // 16 bytes as words
typedef int16_t LooseSpread __attribute__((vector_size(32), aligned(2), may_alias));

inline Bytes load_bytes(const uint8_t* p) { return *reinterpret_cast<const LooseBytes*>(p); }

// Codes of Bits in 16 bytes: those of plane p (bits p * Bits and up) go to `to + p * stride`.
template <int Bits>
inline void spread(Bytes bytes, int16_t* to, int64_t stride) {
#if defined(__AVX2__)
  const Spread words = (Spread)_mm256_cvtepu8_epi16((__m128i)bytes);
#else
  const Spread words = __builtin_convertvector(bytes, Spread);
#endif
  const Spread mask = Spread{} + int16_t{(1 << Bits) - 1};
#pragma GCC unroll 4
  for (int p = 0; p < 8 / Bits; ++p)
    *reinterpret_cast<LooseSpread*>(to + p * stride) =
        Bits == 8 ? words : (words >> p * Bits) & mask;
}

template <int Bits>
inline int16_t code_of(uint8_t byte, int plane) {
  return static_cast<int16_t>((byte >> plane * Bits) & ((1 << Bits) - 1));
}

// Rows of `bytes` packed bytes, `row` bytes apart, as codes in the order of their channels.
template <int Bits>
void spread_rows(const uint8_t* from, int64_t row, int32_t rows, int32_t bytes, int16_t* to,
                 int64_t to_row) {
  int32_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const uint8_t* at = from + i;
    int16_t* into = to + i;
    for (int32_t j = 0; j < rows; ++j, at += row, into += to_row)
      spread<Bits>(load_bytes(at), into, bytes);
  }
  for (; i < bytes; ++i)
    for (int32_t j = 0; j < rows; ++j)
      for (int p = 0; p < 8 / Bits; ++p)
        to[j * to_row + p * bytes + i] = code_of<Bits>(from[j * row + i], p);
}

// The same with codes of two rows side by side: (rows / 2, channel, 2). The last row of an odd
// number stands beside itself.
template <int Bits>
void spread_pairs(const uint8_t* from, int64_t row, int32_t rows, int32_t bytes, int16_t* to,
                  int64_t to_row) {
  const Bytes low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  int32_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const uint8_t* at = from + i;
    int16_t* into = to + 2 * i;
    for (int32_t j = 0; j < rows; j += 2, at += 2 * row, into += 2 * to_row) {
      const Bytes a = load_bytes(at), b = load_bytes(j + 1 < rows ? at + row : at);
      spread<Bits>(__builtin_shuffle(a, b, low), into, 2 * bytes);
      spread<Bits>(__builtin_shuffle(a, b, low + 8), into + 16, 2 * bytes);
    }
  }
  for (; i < bytes; ++i)
    for (int32_t j = 0; j < rows; ++j)
      for (int p = 0; p < 8 / Bits; ++p)
        to[j / 2 * 2 * to_row + 2 * (p * bytes + i) + j % 2] = code_of<Bits>(from[j * row + i], p);
}

}  // namespace foveate
