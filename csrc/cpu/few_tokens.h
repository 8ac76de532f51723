// Products for a few tokens: rows of W are read once, from first to last, and each is multiplied with every token.
//
// An NF4 weight is looked up into registers and used there. A word of 16 bits holds four codes. So four lookups, with a
// shift by four bits between them, give sixteen values each, one a word; the tokens are put into that order beforehand.
#pragma once

#include <algorithm>

#include "bf16_operands.h"

#if FASTLORA_HAS_BF16
namespace fastlora {
namespace {

constexpr int64_t kFewTokens = 8;
constexpr int kFewRows = 4;  // rows of W that are multiplied at a time with few tokens
// Columns that are summed separately, a few hundred in each lane, before their sums are added to the earlier ones.
constexpr int64_t kStretch = 8192;

// acc[t][i] += x[t] . w[i].
template <int kTokens>
FASTLORA_BF16 void dot_tile(const Bf16* x, int64_t x_stride, const Bf16* const* w, int64_t count,
                            __m512 (*acc)[kFewRows]) {
  for (int64_t begin = 0; begin < count; begin += kStretch) {
    const int64_t end = std::min(count, begin + kStretch);
    __m512 total[kTokens][kFewRows];
    FASTLORA_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      FASTLORA_UNROLL
      for (int i = 0; i < kFewRows; ++i) total[t][i] = _mm512_setzero_ps();
    }
    for (int64_t at = begin; at < end; at += kWide) {
      __m512bh row[kFewRows];
      FASTLORA_UNROLL
      for (int i = 0; i < kFewRows; ++i) row[i] = (__m512bh)load_some(w[i] + at, end - at);
      FASTLORA_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const __m512bh token = (__m512bh)load_some(x + t * x_stride + at, end - at);
        FASTLORA_UNROLL
        for (int i = 0; i < kFewRows; ++i) total[t][i] = _mm512_dpbf16_ps(total[t][i], token, row[i]);
      }
    }
    FASTLORA_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      FASTLORA_UNROLL
      for (int i = 0; i < kFewRows; ++i) acc[t][i] = _mm512_add_ps(acc[t][i], total[t][i]);
    }
  }
}

FASTLORA_BF16 void dot(const Bf16* x, int64_t x_stride, int64_t tokens, const Bf16* const* w, int64_t count,
                       __m512 (*acc)[kFewRows]) {
  for (; tokens > 0; tokens -= 4, x += 4 * x_stride, acc += 4) {
    switch (std::min<int64_t>(4, tokens)) {
      case 1:
        dot_tile<1>(x, x_stride, w, count, acc);
        break;
      case 2:
        dot_tile<2>(x, x_stride, w, count, acc);
        break;
      case 3:
        dot_tile<3>(x, x_stride, w, count, acc);
        break;
      default:
        dot_tile<4>(x, x_stride, w, count, acc);
    }
  }
}

// Row `i` of kFewRows; beyond the last row, the last one again.
inline void point_at(const Matrix& matrix, int64_t rows, const Bf16** out) {
  for (int64_t i = 0; i < kFewRows; ++i) out[i] = matrix.at(std::min(i, rows - 1), 0);
}

constexpr int64_t kCodeColumns = 64;  // columns whose codes fill a vector of 256 bits
constexpr int kLookups = 4;

// Whether `dot_codes` takes this weight: its blocks begin and end where vectors of codes do.
inline bool is_read_from_codes(const LoraLinear& linear) {
  return linear.weight == nullptr && linear.nf4.cols % kCodeColumns == 0 &&
         (int64_t{1} << linear.nf4.log2_blocksize) >= kCodeColumns;
}

// One token's x [count] in the order of the lookups, stretches of kCodeColumns columns `stride` apart.
FASTLORA_BF16 inline void in_order_of_codes(const Bf16* x, int64_t count, Bf16* out, int64_t stride) {
  // The low nibble of a byte holds the second of its two columns, but comes first.
  alignas(64) static constexpr uint16_t kOrder[2][kWide] = {
      {1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
       0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60},
      {3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63,
       2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62}};
  for (int64_t at = 0; at < count; at += kCodeColumns, out += stride) {
    const __m512i a = _mm512_loadu_si512(x + at), b = _mm512_loadu_si512(x + at + kWide);
    for (int half = 0; half < 2; ++half) {
      const __m512i order = _mm512_load_si512(kOrder[half]);
      _mm512_storeu_si512(out + half * kWide, _mm512_permutex2var_epi16(a, order, b));
    }
  }
}

FASTLORA_BF16_INLINE void look_up(const Nf4Weight& weight, int64_t flat, __m256bh (&w)[kLookups]) {
  const uint8_t* from = weight.codes + flat / 2;
  __builtin_prefetch(from + kRowsAhead * weight.cols / 2);
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i table = nf4_products(nf4_scale(weight, flat >> weight.log2_blocksize));
  FASTLORA_UNROLL
  for (int s = 0; s < kLookups; ++s) {
    w[s] = (__m256bh)_mm256_permutexvar_epi16(_mm256_srli_epi16(codes, 4 * s), table);
  }
}

// acc[t][first + i] += x[t] . W[row + i] over columns [col, end), for i < kRows; x, from `col` on, as
// [columns / kCodeColumns][kTokens][kCodeColumns]. Rows from `rows` on are the last.
template <int kTokens, int kRows>
FASTLORA_BF16 void dot_codes_tile(const Nf4Weight& weight, int64_t row, int64_t rows, int64_t col, int64_t end,
                                  const Bf16* x, __m512 (*acc)[kFewRows], int first) {
  __m256 total[kTokens][kRows];
  int64_t begin[kRows];
  FASTLORA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    begin[i] = (row + std::min<int64_t>(i, rows - 1)) * weight.cols;
    FASTLORA_UNROLL
    for (int t = 0; t < kTokens; ++t) total[t][i] = _mm256_setzero_ps();
  }
  for (int64_t at = col; at < end; at += kCodeColumns, x += kTokens * kCodeColumns) {
    FASTLORA_UNROLL
    for (int i = 0; i < kRows; i += 2) {
      __m256bh w[2][kLookups];
      look_up(weight, begin[i] + at, w[0]);
      look_up(weight, begin[i + 1] + at, w[1]);
      FASTLORA_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        FASTLORA_UNROLL
        for (int s = 0; s < kLookups; ++s) {
          const auto* from = reinterpret_cast<const __m256i*>(x + t * kCodeColumns) + s;
          const __m256bh token = (__m256bh)_mm256_loadu_si256(from);
          total[t][i] = _mm256_dpbf16_ps(total[t][i], token, w[0][s]);
          total[t][i + 1] = _mm256_dpbf16_ps(total[t][i + 1], token, w[1][s]);
        }
      }
    }
  }
  FASTLORA_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    FASTLORA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      __m512& sum = acc[t][first + i];
      sum = _mm512_add_ps(sum, _mm512_insertf32x8(_mm512_setzero_ps(), total[t][i], 0));
    }
  }
}

// As many sums as the registers hold: two rows at a time for more than four tokens.
template <int kTokens>
void dot_codes(const Nf4Weight& weight, int64_t row, int64_t rows, const Bf16* x, __m512 (*acc)[kFewRows]) {
  for (int64_t col = 0; col < weight.cols; col += kStretch, x += kTokens * kStretch) {
    const int64_t end = std::min(weight.cols, col + kStretch);
    if constexpr (kTokens <= 4) {
      dot_codes_tile<kTokens, kFewRows>(weight, row, rows, col, end, x, acc, 0);
    } else {
      dot_codes_tile<kTokens, 2>(weight, row, rows, col, end, x, acc, 0);
      if (rows > 2) dot_codes_tile<kTokens, 2>(weight, row + 2, rows - 2, col, end, x, acc, 2);
    }
  }
}

using DotCodes = void (*)(const Nf4Weight&, int64_t, int64_t, const Bf16*, __m512 (*)[kFewRows]);
constexpr DotCodes kDotCodes[kFewTokens] = {dot_codes<1>, dot_codes<2>, dot_codes<3>, dot_codes<4>,
                                            dot_codes<5>, dot_codes<6>, dot_codes<7>, dot_codes<8>};

}  // namespace
}  // namespace fastlora
#endif
