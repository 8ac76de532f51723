// Eight-lane vectors: AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define FASTLORA_TARGET __attribute__((target("avx2,fma,f16c")))
#define FASTLORA_VECTOR FASTLORA_TARGET __attribute__((always_inline)) inline

namespace fastlora {
namespace {

using F = __m256;
typedef uint32_t U __attribute__((vector_size(32)));
constexpr int W = 8;
constexpr int kVecs = 2;
alignas(32) constexpr Nf4Code kCode = nf4_code();

FASTLORA_VECTOR F set1(float value) { return _mm256_set1_ps(value); }
FASTLORA_VECTOR F load(const float* p) { return _mm256_loadu_ps(p); }
FASTLORA_VECTOR F load(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FASTLORA_VECTOR F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FASTLORA_VECTOR F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FASTLORA_VECTOR F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FASTLORA_VECTOR float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Four bytes in every lane; each lane shifts its own nibble down. The table is two registers, chosen by bit 3.
FASTLORA_VECTOR F lookup(const uint8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
  const F low = _mm256_permutevar8x32_ps(_mm256_load_ps(kCode.value), index);
  const F high = _mm256_permutevar8x32_ps(_mm256_load_ps(kCode.value + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

FASTLORA_VECTOR __m128i narrow(F v, const Bf16*) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i top = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  top = _mm256_srli_epi32(_mm256_blendv_epi8(top, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}
FASTLORA_VECTOR __m128i narrow(F v, const Half*) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

FASTLORA_VECTOR void store(float* out, F v) { _mm256_storeu_ps(out, v); }
template <class T>
FASTLORA_VECTOR void store(T* out, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow(v, out));
}

// The order of Philox counters in the lanes with which `interleave` puts their results in order.
constexpr U kCounters = {0, 2, 4, 6, 1, 3, 5, 7};

// Both halves of the 64-bit products.
FASTLORA_VECTOR void multiply(U a, uint32_t factor, U* high, U* low) {
  const __m256i factors = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factors);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factors);
  *high = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

FASTLORA_VECTOR void interleave(U a, U b, U c, U d, uint16_t* out) {
  const __m256i ab = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  const __m256i cd = _mm256_unpacklo_epi32((__m256i)c, (__m256i)d);
  const __m256i ab_high = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  const __m256i cd_high = _mm256_unpackhi_epi32((__m256i)c, (__m256i)d);
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_unpacklo_epi64(ab, cd));
  _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(ab, cd));
  _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(ab_high, cd_high));
  _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(ab_high, cd_high));
}

// `kept`, and 0 where the bits are below the threshold.
FASTLORA_VECTOR F mask(const uint16_t* bits, int threshold, F kept) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(threshold), words)), kept);
}

#include "kernels.inl"

}  // namespace

const Kernels kAvx2Kernels = kernels();

}  // namespace fastlora
#endif
