// Four-lane vectors in the compiler's own notation: SSE2 on x86-64, NEON on aarch64, scalars elsewhere.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define FASTLORA_TARGET
#define FASTLORA_VECTOR inline

namespace fastlora {
namespace {

typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kVecs = 2;  // vectors of a tile's width
constexpr Nf4Code kCode = nf4_code();

inline F set1(float value) { return F{value, value, value, value}; }
inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline F load(const T* p) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float sum(F v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline F lookup(const uint8_t* codes) {
  return F{kCode.value[codes[0] >> 4], kCode.value[codes[0] & 15], kCode.value[codes[1] >> 4],
           kCode.value[codes[1] & 15]};
}
template <class T>
inline void store(T* out, F v) {
  for (int i = 0; i < W; ++i) from_float(v[i], out + i);
}

constexpr U kCounters = {0, 1, 2, 3};

// Both halves of the 64-bit products.
inline void multiply(U a, uint32_t factor, U* high, U* low) {
  for (int i = 0; i < W; ++i) {
    const uint64_t product = uint64_t{a[i]} * factor;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
}
inline void interleave(U a, U b, U c, U d, uint16_t* out) {
  for (int i = 0; i < W; ++i) {
    for (uint32_t word : {a[i], b[i], c[i], d[i]}) {
      *out++ = static_cast<uint16_t>(word);
      *out++ = static_cast<uint16_t>(word >> 16);
    }
  }
}
// `kept`, and 0 where the bits are below the threshold.
inline F mask(const uint16_t* bits, int threshold, F kept) {
  for (int i = 0; i < W; ++i) kept[i] = bits[i] < threshold ? 0.0f : kept[i];
  return kept;
}

#include "kernels.inl"

}  // namespace

const Kernels kPortableKernels = kernels();

}  // namespace fastlora
