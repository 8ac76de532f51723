// The bf16 product of AVX512_BF16: one micro-kernel, and the code that brings operands into the two forms it reads.
//
// A product contracts pairs of neighbours: vdpbf16ps adds the products of sixteen pairs of bf16 numbers to sixteen fp32
// sums. One operand is a panel, [pairs][kWide] pairs, read a vector at a time. The other is rows as they are in memory,
// of which one pair at a time is broadcast:
//
//     c[i][j] += sum over p of  rows[i][2p] panel[p][j].lo + rows[i][2p + 1] panel[p][j].hi
//
// A matrix whose rows run along the contraction becomes panels by `pack_across` (a transposition), one whose rows run
// across it by `pack_along` (an interleaving of two rows). Sums stay in fp32 from first to last: a call sums its own
// terms first and adds the sum to c, so a long contraction, which takes many calls, is a sum of short ones.
#pragma once

#include "linear.h"

#if FASTLORA_HAS_BF16
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "convert.h"

#define FASTLORA_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#define FASTLORA_BF16_INLINE FASTLORA_BF16 __attribute__((always_inline)) inline
#define FASTLORA_UNROLL _Pragma("GCC unroll 16")

namespace fastlora {
namespace {

constexpr int kLanes = 16;
constexpr int kWide = 2 * kLanes;  // columns of a panel
constexpr int kTileRows = 8;

// Two neighbours of a row; the pair may begin at any element.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

// Memory that is needed soon: requested a few lines at a time, amid arithmetic, because a burst of requests is dropped.
class Ahead {
 public:
  Ahead() = default;
  // `rows` of `bytes`, `stride` apart, over about `steps` steps.
  Ahead(const void* begin, int64_t rows, int64_t bytes, int64_t stride, int64_t steps)
      : line_(static_cast<const char*>(begin)),
        end_(line_ + bytes),
        rows_(rows),
        bytes_(bytes),
        stride_(stride),
        lines_per_step_(1 + rows * ((bytes + 63) / 64) / std::max<int64_t>(1, steps)) {}

  void step() {
    for (int64_t i = lines_per_step_; i > 0 && rows_ > 0; --i) {
      __builtin_prefetch(line_);
      line_ += 64;
      if (line_ < end_) continue;
      line_ = end_ + stride_ - bytes_;
      end_ += stride_;
      --rows_;
    }
  }

 private:
  const char* line_ = nullptr;
  const char* end_ = nullptr;
  int64_t rows_ = 0;
  int64_t bytes_ = 0;
  int64_t stride_ = 0;
  int64_t lines_per_step_ = 0;
};
constexpr int64_t kStepPairs = 16;
constexpr int64_t kStreams = 8;

FASTLORA_BF16_INLINE __m512i load_pairs(const Pair* p) { return _mm512_loadu_si512(p); }

template <int kRows, int kVecs>
FASTLORA_BF16 void tile(const Pair* panel, const Bf16* rows, int64_t stride, int64_t pairs, float* c, int64_t c_stride,
                        Ahead& ahead) {
  __m512 acc[kRows][kVecs];
  FASTLORA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTLORA_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[i][v] = _mm512_setzero_ps();
  }
  for (int64_t done = 0; done < pairs; done += kStepPairs) {
    ahead.step();
    for (int64_t p = std::min(kStepPairs, pairs - done); p > 0; --p, panel += kWide, rows += 2) {
      __m512i wide[kVecs];
      FASTLORA_UNROLL
      for (int v = 0; v < kVecs; ++v) wide[v] = load_pairs(panel + v * kLanes);
      FASTLORA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int pair = static_cast<int>(*reinterpret_cast<const Pair*>(rows + i * stride));
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
        FASTLORA_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], row, (__m512bh)wide[v]);
      }
    }
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTLORA_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + i * c_stride + v * kLanes;
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), acc[i][v]));
    }
  }
}

using Multiply = void (*)(const Pair*, const Bf16*, int64_t, int64_t, float*, int64_t, Ahead&);
constexpr Multiply kTiles[2][kTileRows] = {
    {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>, tile<7, 1>, tile<8, 1>},
    {tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>, tile<7, 2>, tile<8, 2>},
};

// c [count][columns] += rows times one panel; columns <= kWide, and c has room for the next multiple of kLanes.
inline void multiply(const Pair* panel, int64_t columns, const Bf16* rows, int64_t count, int64_t stride, int64_t pairs,
                     float* c, int64_t c_stride, Ahead& ahead) {
  const Multiply* tiles = kTiles[columns > kLanes];
  for (int64_t i = 0; i < count; i += kTileRows) {
    tiles[std::min<int64_t>(kTileRows, count - i) - 1](panel, rows + i * stride, stride, pairs, c + i * c_stride,
                                                       c_stride, ahead);
  }
}

inline void multiply(const Pair* panel, int64_t columns, const Bf16* rows, int64_t count, int64_t stride, int64_t pairs,
                     float* c, int64_t c_stride) {
  Ahead nothing;
  multiply(panel, columns, rows, count, stride, pairs, c, c_stride, nothing);
}

// Rows of sixteen 32-bit words become columns.
FASTLORA_BF16_INLINE void transpose(__m512i (&r)[kLanes]) {
  __m512i t[kLanes];
  FASTLORA_UNROLL
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kLanes; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // A quarter of r[4 i + j] is now column 4 quarter + j of four rows.
  FASTLORA_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

// `count` elements, the rest zero; nothing beyond them is read.
FASTLORA_BF16_INLINE __m512i load_some(const Bf16* p, int64_t count) {
  if (count >= kWide) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
}

FASTLORA_BF16_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::min<int64_t>(count, kLanes)) - 1);
}

// src [rows][count], contracted along its rows, as a panel [count / 2][rows]: rows <= kWide, and the columns from
// `rows` to the next multiple of kLanes are zero.
FASTLORA_BF16 inline void pack_across(const Bf16* src, int64_t stride, int64_t rows, int64_t count, Pair* panel) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t at = 0; at < count; at += kWide) {
      __m512i r[kLanes];
      FASTLORA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        r[i] = row + i < rows ? load_some(src + (row + i) * stride + at, count - at) : _mm512_setzero_si512();
      }
      transpose(r);
      Pair* out = panel + at / 2 * kWide + row;
      const int64_t pairs = std::min<int64_t>(kLanes, (count - at + 1) / 2);
      for (int64_t i = 0; i < pairs; ++i) _mm512_storeu_si512(out + i * kWide, r[i]);
    }
  }
}

// src [rows][columns], contracted across its rows, as panels [panel][pairs][kWide], `pairs` apart; columns beyond are
// zero, and so is the second row of the last pair where `rows` is odd.
FASTLORA_BF16 inline void pack_along(const Bf16* src, int64_t stride, int64_t rows, int64_t columns, int64_t stride_out,
                                     Pair* panels) {
  alignas(64) static constexpr uint16_t kOrder[2][kWide] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i low = _mm512_load_si512(kOrder[0]), high = _mm512_load_si512(kOrder[1]);
  // Eight rows side by side: as many streams as the hardware prefetches.
  for (int64_t first = 0; first < rows; first += kStreams) {
    const int64_t end = std::min(rows, first + kStreams);
    for (int64_t at = 0; at < columns; at += kWide) {
      Pair* out = panels + at / kWide * stride_out + first / 2 * kWide;
      for (int64_t row = first; row < end; row += 2, out += kWide) {
        const Bf16* from = src + row * stride + at;
        const __m512i a = load_some(from, columns - at);
        const __m512i b = row + 1 < rows ? load_some(from + stride, columns - at) : _mm512_setzero_si512();
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
}

// out[0 .. parts): bf16 numbers that add up to `value`: to 8 bits of it, 16, or all 24. A value that is not finite is
// the first part, and the others are zero.
FASTLORA_BF16_INLINE void split(__m512 value, int parts, __m256i* out) {
  for (int part = 0; part < parts; ++part) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
    out[part] = rounded;
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    const __mmask16 finite = _mm512_cmplt_epu32_mask(
        _mm512_and_si512(_mm512_castps_si512(back), _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
    value = _mm512_maskz_sub_ps(finite, value, back);
  }
}

// src [count] in `parts` rows, `part_stride` apart.
FASTLORA_BF16 inline void split_row(const float* src, int64_t count, int parts, Bf16* out, int64_t part_stride) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 some = first_lanes(count - i);
    __m256i part[3];
    split(_mm512_maskz_loadu_ps(some, src + i), parts, part);
    for (int p = 0; p < parts; ++p) _mm256_mask_storeu_epi16(out + p * part_stride + i, some, part[p]);
  }
}

FASTLORA_BF16_INLINE void store_some(Bf16* out, __m512 value, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(out, lanes, (__m256i)_mm512_cvtneps_pbh(value));
}
FASTLORA_BF16_INLINE void store_some(float* out, __m512 value, __mmask16 lanes) {
  _mm512_mask_storeu_ps(out, lanes, value);
}

// out[i][j] = factor * c[i][j], rounded once.
template <class T>
FASTLORA_BF16 inline void store_rows(const float* c, int64_t c_stride, int64_t rows, int64_t columns, float factor,
                                     T* out, int64_t stride) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const __m512 value = _mm512_mul_ps(scale, _mm512_loadu_ps(c + i * c_stride + j));
      store_some(out + i * stride + j, value, first_lanes(columns - j));
    }
  }
}

// out[j][i] = factor * c[i][j], rounded once.
template <class T>
FASTLORA_BF16 inline void store_columns(const float* c, int64_t c_stride, int64_t rows, int64_t columns, float factor,
                                        T* out, int64_t stride) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, columns - j);
    for (int64_t i = 0; i < rows; i += kLanes) {
      __m512i r[kLanes];
      FASTLORA_UNROLL
      for (int row = 0; row < kLanes; ++row) {
        r[row] = i + row < rows ? _mm512_loadu_si512(c + (i + row) * c_stride + j) : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t lane = 0; lane < some; ++lane) {
        store_some(out + (j + lane) * stride + i, _mm512_mul_ps(scale, _mm512_castsi512_ps(r[lane])),
                   first_lanes(rows - i));
      }
    }
  }
}

}  // namespace
}  // namespace fastlora
#endif
