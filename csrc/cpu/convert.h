// Scalar conversions between fp32 and the 16-bit formats, to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastlora {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return float_of(uint32_t{value.bits} << 16); }
inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | rest << 13);  // inf, NaN
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline void from_float(float value, float* out) { *out = value; }
inline void from_float(float value, Bf16* out) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void from_float(float value, Half* out) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  uint32_t rest = bits_of(value) & 0x7fffffffu;
  if (rest >= 0x47800000u) {  // 65536 and above, inf, NaN
    rest = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (rest < 0x38800000u) {
    // A subnormal half: adding 0.5, whose last bit weighs 2^-24 as a subnormal half's does, makes the rounding.
    rest = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  } else {
    rest = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | rest);
}

}  // namespace fastlora
