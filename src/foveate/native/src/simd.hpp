// Vectors of float32 in the compiler's own vector type: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace foveate {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kVectorBytes = kWidth * 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef float LooseVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t LooseIntVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
inline IntVec load_int(const int32_t* p) { return *reinterpret_cast<const LooseIntVec*>(p); }
inline Vec splat(float x) { return Vec{} + x; }
inline IntVec splat(int32_t x) { return IntVec{} + x; }

// The larger of the two; where x is NaN the result is NaN, whatever `floor` is.
inline Vec at_least(Vec x, Vec floor) { return floor > x ? floor : x; }

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// 2^x for x <= 0, within 2 units in the last place; 0 below -126, NaN for NaN.
inline Vec exp2_of(Vec x) {
  x = at_least(x, splat(-127.0f));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);  // in [-0.5, 0.5]
  Vec p = splat(1.54697361e-4f);
  p = p * f + 1.34004369e-3f;
  p = p * f + 9.61802559e-3f;
  p = p * f + 5.55032720e-2f;
  p = p * f + 2.40226512e-1f;
  p = p * f + 6.93147207e-1f;
  p = p * f + 1.0f;
  // The whole number lies in the low bits of `shifted`; moved into the exponent it is a power of 2.
  const IntVec power = ((IntVec)shifted << 23) + splat(int32_t{127 << 23});
  return p * (Vec)power;
}

}  // namespace foveate
