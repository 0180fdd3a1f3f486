// Numbers of tensors, float32 or bfloat16 where they lie, float32 where they are used.
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.hpp"

namespace foveate {

inline float of_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float number(const Tensor& x, int32_t dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(x.data)[at];
  return of_bfloat16(static_cast<const uint16_t*>(x.data)[at]);
}

// Copies `count` numbers that lie in a row.
inline void numbers(const Tensor& x, int32_t dtype, int64_t at, int32_t count, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(x.data) + at, size_t(count) * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
  for (int i = 0; i < count; ++i) to[i] = of_bfloat16(from[i]);
}

inline void put(const Tensor& x, int32_t dtype, int64_t at, float value) {
  void* data = const_cast<void*>(x.data);
  if (dtype == kFloat32) {
    static_cast<float*>(data)[at] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(rounded);
}

}  // namespace foveate
