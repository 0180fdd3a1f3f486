// Whole numbers of 16 bits: packed codes read as them, and their products summed in pairs.
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

#if !defined(__AVX2__)
// The first bytes of x and y in turn. The compiler's own widening goes byte by byte.
typedef uint8_t Bytes __attribute__((vector_size(16)));
inline Bytes in_turn(Bytes x, Bytes y) {
  return __builtin_shuffle(x, y, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
#endif

// kWords bytes as words.
inline Words load_bytes(const uint8_t* p) {
#if defined(__AVX512BW__)
  return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Bytes bytes{};
  std::memcpy(&bytes, p, kWords);
  return (Words)in_turn(bytes, Bytes{});
#endif
}

// kWidth bytes of two rows side by side, as words.
inline Words load_byte_pairs(const uint8_t* x, const uint8_t* y) {
#if defined(__AVX512BW__)
  const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(y)));
  return (Words)((IntVec)a | (IntVec)b << 16);
#elif defined(__AVX2__)
  const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(y)));
  return (Words)((IntVec)a | (IntVec)b << 16);
#else
  Bytes a{}, b{};
  std::memcpy(&a, x, kWidth);
  std::memcpy(&b, y, kWidth);
  return (Words)in_turn(in_turn(a, b), Bytes{});
#endif
}

// Words that hold bytes, moved so that the codes of a plane are the lowest. All planes start at 0.
template <int Bits, int Planes>
inline Words from_plane(Words bytes, int plane) {
  return Bits * Planes == 8 ? bytes : bytes >> plane * Bits;
}

// Codes of Bits that lie `plane` * Bits above the lowest of words that hold bytes.
template <int Bits>
inline Words codes_of(Words bytes, int plane) {
  const Words moved = bytes >> plane * Bits;
  return (plane + 1) * Bits == 8 ? moved : moved & (Words{} + int16_t{(1 << Bits) - 1});
}

}  // namespace foveate
