// Sixteen-lane vectors: AVX-512 F, BW and VL.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define FASTLORA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define FASTLORA_VECTOR FASTLORA_TARGET __attribute__((always_inline)) inline

namespace fastlora {
namespace {

using F = __m512;
typedef uint32_t U __attribute__((vector_size(64)));
constexpr int W = 16;
constexpr int kVecs = 4;
alignas(64) constexpr Nf4Code kCode = nf4_code();

FASTLORA_VECTOR F set1(float value) { return _mm512_set1_ps(value); }
FASTLORA_VECTOR F load(const float* p) { return _mm512_loadu_ps(p); }
FASTLORA_VECTOR F load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FASTLORA_VECTOR F load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTLORA_VECTOR F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FASTLORA_VECTOR F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FASTLORA_VECTOR float sum(F v) { return _mm512_reduce_add_ps(v); }

// Each lane holds the four bytes its nibble is in and shifts it down; the permutation reads only the low four bits.
FASTLORA_VECTOR F lookup(const uint8_t* codes) {
  int32_t word[2];
  std::memcpy(word, codes, sizeof word);
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(word[0]), 0xff00, word[1]);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), _mm512_load_ps(kCode.value));
}

FASTLORA_VECTOR __m256i narrow(F v, const Bf16*) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i top = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(top, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}
FASTLORA_VECTOR __m256i narrow(F v, const Half*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

FASTLORA_VECTOR void store(float* out, F v) { _mm512_storeu_ps(out, v); }
template <class T>
FASTLORA_VECTOR void store(T* out, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(v, out));
}

// The order of Philox counters in the lanes with which `interleave` puts their results in order.
constexpr U kCounters = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

// Both halves of the 64-bit products.
FASTLORA_VECTOR void multiply(U a, uint32_t factor, U* high, U* low) {
  const __m512i factors = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factors);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factors);
  *high = (U)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  *low = (U)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
}

FASTLORA_VECTOR void interleave(U a, U b, U c, U d, uint16_t* out) {
  const __m512i ab = _mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
  const __m512i cd = _mm512_unpacklo_epi32((__m512i)c, (__m512i)d);
  const __m512i ab_high = _mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
  const __m512i cd_high = _mm512_unpackhi_epi32((__m512i)c, (__m512i)d);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
  _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(ab, cd));
  _mm512_storeu_si512(out + 64, _mm512_unpacklo_epi64(ab_high, cd_high));
  _mm512_storeu_si512(out + 96, _mm512_unpackhi_epi64(ab_high, cd_high));
}

// `kept`, and 0 where the bits are below the threshold.
FASTLORA_VECTOR F mask(const uint16_t* bits, int threshold, F kept) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
  return _mm512_maskz_mov_ps(_mm512_cmpge_epi32_mask(words, _mm512_set1_epi32(threshold)), kept);
}

#include "kernels.inl"

}  // namespace

const Kernels kAvx512Kernels = kernels();

}  // namespace fastlora
#endif
