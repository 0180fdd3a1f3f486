// Vectors of float32 in the compiler's own vector type: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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
// x - 0 is x for every x, also for -0; x + 0 would be an addition.
inline Vec splat(float x) { return x - Vec{}; }
inline IntVec splat(int32_t x) { return IntVec{} + x; }

// The larger of the two; where x is NaN the result is NaN, whatever `floor` is.
inline Vec at_least(Vec x, Vec floor) { return floor > x ? floor : x; }

inline bool any(IntVec mask) {
  uint64_t parts[kVectorBytes / 8], all = 0;
  std::memcpy(parts, &mask, kVectorBytes);
  for (uint64_t part : parts) all |= part;
  return all != 0;
}

// `n` rounded up to whole vectors.
inline int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

namespace detail {

// Which of two vectors' lanes goes to `lane` when neighbours in blocks of `block` lanes are paired:
// the lower (part 0) or upper (part 1) halves of the blocks. Blocks of 4 interleave first, as
// processors do it in one step; 2 stands for that.
constexpr int32_t paired(int lane, int block, int part) {
  if (block == 2) {
    const int t = lane % 4;
    return lane - t + part * 2 + t / 2 + t % 2 * kWidth;
  }
  const int t = lane % block, half = block / 2;
  return lane - t + part * half + (t < half ? t : t - half + kWidth);
}

template <int Block, class V, int... Lane>
inline V pair_sums(V x, V y, std::integer_sequence<int, Lane...>) {
  return __builtin_shuffle(x, y, IntVec{paired(Lane, Block, 0)...}) +
         __builtin_shuffle(x, y, IntVec{paired(Lane, Block, 1)...});
}

}  // namespace detail

// Sums of two vectors' lanes in one vector: see `sum_each`.
template <int Block, class V>
inline V pair_sums(V x, V y) {
  return detail::pair_sums<Block>(x, y, std::make_integer_sequence<int, kWidth>{});
}

// Lane i of the result is the sum of all lanes of x[i]; x holds kWidth vectors.
template <class V>
inline V sum_each(const V* x) {
  V four[kWidth / 4];
  for (int i = 0; i < kWidth / 4; ++i) {
    const V* at = x + 4 * i;
    four[i] = pair_sums<4>(pair_sums<2>(at[0], at[1]), pair_sums<2>(at[2], at[3]));
  }
#if defined(__AVX512F__)
  return pair_sums<8>(pair_sums<16>(four[0], four[2]), pair_sums<16>(four[1], four[3]));
#elif defined(__AVX2__)
  return pair_sums<8>(four[0], four[1]);
#else
  return four[0];
#endif
}

// The largest lane of x; NaN does not count.
inline float max_lane(Vec x) {
  for (int half = kWidth / 2; half > 0; half /= 2) {
    IntVec other;
    for (int l = 0; l < kWidth; ++l) other[l] = l ^ half;
    const Vec y = __builtin_shuffle(x, other);
    x = x > y ? x : y;
  }
  return x[0];
}

inline float sum_lanes(Vec x) {
  float sum = 0.0f;
  for (int l = 0; l < kWidth; ++l) sum += x[l];
  return sum;
}

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

// Hyperbolic tangent: 1 - 2 / (e^2|x| + 1), with the exponent kept at or below 0.
inline Vec tanh_of(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec e = exp2_of(size * (-2.0f * kLog2e));
  const Vec t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

}  // namespace foveate
