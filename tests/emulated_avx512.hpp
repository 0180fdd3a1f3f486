// Included before the kernels: their sources for AVX-512 on a processor without it. Vectors of 16
// lanes are the compiler's own and are cut in two by it; the few instructions that the sources name
// are made of two of AVX2.
#pragma once

#include <immintrin.h>

#include <cstring>

typedef long long Emulated __attribute__((vector_size(64)));

inline Emulated joined(__m256i low, __m256i high) {
  const __m256i parts[2] = {low, high};
  Emulated both;
  std::memcpy(&both, parts, 64);
  return both;
}

inline Emulated emulated_madd(Emulated x, Emulated y) {
  __m256i a[2], b[2];
  std::memcpy(a, &x, 64);
  std::memcpy(b, &y, 64);
  return joined(_mm256_madd_epi16(a[0], b[0]), _mm256_madd_epi16(a[1], b[1]));
}

inline Emulated emulated_words(__m256i bytes) {
  return joined(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)),
                _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1)));
}

inline Emulated emulated_ints(__m128i bytes) {
  return joined(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}

#define __m512i Emulated
#define _mm512_madd_epi16(x, y) emulated_madd((Emulated)(x), (Emulated)(y))
#define _mm512_cvtepu8_epi16 emulated_words
#define _mm512_cvtepu8_epi32 emulated_ints
#define __AVX512F__ 1
#define __AVX512BW__ 1
