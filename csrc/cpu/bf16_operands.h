// What the one-call products read besides activations, in bf16: the base weight, and adapters in parts.
//
// bf16 adapters are one part. An fp32 adapter is the sum of three bf16 parts, which hold its 24 bits (a forward of few
// tokens multiplies it as it is). x Aᵀ and dy B take all three parts. Products of two fp32 factors, whose result is
// bf16, take the first two of each: A1 h1 + A2 h1 + A1 h2.
#pragma once

#include "bf16_tiles.h"

#if FASTLORA_HAS_BF16
#include "kernels.h"
#include "parallel.h"

namespace fastlora {

// Memory that a thread keeps from call to call, because the page faults of fresh memory cost more than many a product.
// What the memory held before is lost.
char* kept_room(int64_t bytes);
// Likewise, of a fixed size, for one job.
constexpr int64_t kJobRoom = 1 << 20;
char* job_room();

namespace {

constexpr int64_t kStep = 512;  // rows or columns of an adapter at a time
constexpr int kMaxParts = 3;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// Arrays one after another in the memory that a thread keeps, each starting on a cache line.
class Layout {
 public:
  template <class T>
  struct Place {
    int64_t offset;
  };

  template <class T>
  Place<T> add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return {at};
  }
  bool allocate() { return (room_ = kept_room(bytes_)) != nullptr; }
  template <class T>
  T* at(Place<T> place) const {
    return reinterpret_cast<T*>(room_ + place.offset);
  }

 private:
  int64_t bytes_ = 0;
  char* room_ = nullptr;
};

// Waking a thread costs as much as a few thousand operations on vectors.
inline int worth(int64_t vectors, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + (vectors >> 12)));
}

// Runs body(begin) for each step of kStep below `count`.
template <class Body>
void for_steps(int64_t count, int threads, const Body& body) {
  parallel_for(ceil_div(count, kStep), threads, [&](int64_t index) { body(index * kStep); });
}

// A matrix of bf16 numbers with adjacent columns.
struct Matrix {
  const Bf16* data;
  int64_t stride;

  const Bf16* at(int64_t row, int64_t col) const { return data + row * stride + col; }
};

inline Matrix matrix(const Activations& x) { return {static_cast<const Bf16*>(x.data), x.row_stride}; }

// The products of the sixteen levels and one scale, rounded to bf16 as a weight is anyway: a table to look codes up in.
FASTLORA_BF16_INLINE __m256i nf4_products(float scale) {
  alignas(64) static constexpr Nf4Code kCode = nf4_code();
  return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_load_ps(kCode.value)));
}

FASTLORA_BF16_INLINE __m512i side_by_side(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// The 32 values of one group, of one scale; the table holds everything twice.
FASTLORA_BF16_INLINE void nf4_group(const uint8_t* codes, __m512i table, Bf16* out) {
  // Each byte goes to two words, of which the first shifts its high nibble down; a lookup reads the low five bits only.
  const __m512i spread =
      _mm512_set_epi64(0x800f800f800e800eu, 0x800d800d800c800cu, 0x800b800b800a800au, 0x8009800980088008u,
                       0x8007800780068006u, 0x8005800580048004u, 0x8003800380028002u, 0x8001800180008000u);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi32(4));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

// Rows of codes that are prefetched; more would evict one another from the first-level cache, in which rows a power of
// two apart have few places. They are requested every kAskedColumns columns, half a line, because some requests are
// dropped.
constexpr int64_t kRowsAhead = 4;
constexpr int64_t kAskedColumns = 64;

// out [rows][count] = rows of W from `row`, columns from `col`; col and count are multiples of kGroup, as K is.
FASTLORA_BF16 inline void nf4_rows(const Nf4Weight& weight, int64_t row, int64_t rows, int64_t col, int64_t count,
                                   Bf16* out, int64_t stride) {
  const int64_t blocksize = int64_t{1} << weight.log2_blocksize;
  for (int64_t i = 0; i < rows; ++i, out += stride) {
    const int64_t begin = (row + i) * weight.cols + col, end = begin + count;
    Bf16* to = out;
    for (int64_t at = begin; at < end;) {
      const int64_t block = at >> weight.log2_blocksize, stop = std::min(end, (block + 1) * blocksize);
      const __m256i products = nf4_products(nf4_scale(weight, block));
      const __m512i table = side_by_side(products, products);
      for (; at < stop; at += kGroup, to += kGroup) {
        const uint8_t* codes = weight.codes + at / 2;
        if ((at - begin) % kAskedColumns == 0) __builtin_prefetch(codes + kRowsAhead * weight.cols / 2);
        nf4_group(codes, table, to);
      }
    }
  }
}

// One group of two rows in pairs; the table holds the first row's products, then the second's.
FASTLORA_BF16_INLINE void nf4_pairs(const uint8_t* first, const uint8_t* second, __m512i table, Pair* out) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  // Two bytes of each row to a word of 32 bits, in the order in which the last two steps need them.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i mixed = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(a, b)),
                                                _mm_unpackhi_epi8(a, b), 1);
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(mixed, order));
  const __m512i nibble = _mm512_set1_epi32(0x000f000f), of_second = _mm512_set1_epi32(0x00100000);
  const __m512i even = _mm512_or_si512(_mm512_srli_epi16(bytes, 4), of_second);
  const __m512i odd = _mm512_or_si512(_mm512_and_si512(bytes, nibble), of_second);
  const __m512i even_columns = _mm512_permutexvar_epi16(even, table);
  const __m512i odd_columns = _mm512_permutexvar_epi16(odd, table);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi32(even_columns, odd_columns));
  _mm512_storeu_si512(out + kLanes, _mm512_unpackhi_epi32(even_columns, odd_columns));
}

// The same rows as `pack_along` would pack them: panels [panel][rows / 2][kWide], `stride` apart; rows is even.
FASTLORA_BF16 inline void nf4_panels(const Nf4Weight& weight, int64_t row, int64_t rows, int64_t col, int64_t count,
                                     int64_t stride, Pair* panels) {
  static_assert(kGroup == kWide, "a group fills a row of a panel");
  const int64_t in_block = (int64_t{1} << weight.log2_blocksize) - 1, half = weight.cols / 2;
  for (int64_t i = 0; i < rows; i += 2, panels += kWide) {
    const int64_t first = (row + i) * weight.cols + col, second = first + weight.cols;
    __m512i table = _mm512_setzero_si512();
    Pair* out = panels;
    for (int64_t at = 0; at < count; at += kGroup, out += stride) {
      const uint8_t* codes = weight.codes + (first + at) / 2;
      if (at == 0 || ((first + at) & in_block) == 0 || ((second + at) & in_block) == 0) {
        table = side_by_side(nf4_products(nf4_scale(weight, (first + at) >> weight.log2_blocksize)),
                             nf4_products(nf4_scale(weight, (second + at) >> weight.log2_blocksize)));
      }
      if (at % kAskedColumns == 0) {
        __builtin_prefetch(codes + kRowsAhead * half);
        __builtin_prefetch(codes + (kRowsAhead + 1) * half);
      }
      nf4_pairs(codes, codes + half, table, out);
    }
  }
}

// W [row .. row + rows)[col .. col + count) in bf16: in place, or decoded into `room`, rows `room_stride` apart.
inline Matrix weight_rows(const LoraLinear& linear, int64_t row, int64_t rows, int64_t col, int64_t count, Bf16* room,
                          int64_t room_stride) {
  if (linear.weight != nullptr) {
    const Matrix weight{static_cast<const Bf16*>(linear.weight), linear.weight_stride};
    return {weight.at(row, col), weight.stride};
  }
  nf4_rows(linear.nf4, row, rows, col, count, room, room_stride);
  return {room, room_stride};
}

// How the rank of an adapter is laid out in memory once in bf16.
struct Ranks {
  int64_t rank;
  int parts;
  int64_t padded;    // rank, even
  int64_t all;       // parts * padded
  int64_t extended;  // what a product of two adapters contracts: one part by one, or the three pairs of parts
  int64_t stride;    // of a row of `all` sums, a whole number of panels

  explicit Ranks(const LoraLinear& linear)
      : rank(linear.rank),
        parts(linear.adapter_dtype == 0 ? kMaxParts : 1),
        padded(round_up(rank, 2)),
        all(parts * padded),
        extended(parts == 1 ? padded : 3 * padded),
        stride(round_up(all, kWide)) {}

  bool as_they_lie() const { return parts == 1 && padded == rank; }
};

// One row of `rank` fp32 numbers as its parts [part][padded].
FASTLORA_BF16 inline void split_ranks(const Ranks& ranks, const float* row, Bf16* out) {
  split_row(row, ranks.rank, ranks.parts, out, ranks.padded);
  if (ranks.padded != ranks.rank) {
    for (int p = 0; p < ranks.parts; ++p) out[p * ranks.padded + ranks.rank].bits = 0;
  }
}

// The parts of a factor [all] in the order in which `extended` contracts them: 1, 1, 2.
inline void extend(const Ranks& ranks, const Bf16* parts, Bf16* out) {
  const size_t bytes = sizeof(Bf16) * ranks.padded;
  std::memcpy(out, parts, bytes);
  if (ranks.parts == 1) return;
  std::memcpy(out + ranks.padded, parts, bytes);
  std::memcpy(out + 2 * ranks.padded, parts + ranks.padded, bytes);
}

// Adds up the parts of a sum [all], smallest first, times `factor`.
inline void join(const Ranks& ranks, const float* sums, float factor, float* out) {
  for (int64_t r = 0; r < ranks.rank; ++r) {
    float value = sums[(ranks.parts - 1) * ranks.padded + r];
    for (int p = ranks.parts - 2; p >= 0; --p) value += sums[p * ranks.padded + r];
    out[r] = factor * value;
  }
}

// Columns [col, col + count) of A as rows [all][count], where A is not used in place.
inline void split_a(const LoraLinear& linear, const Ranks& ranks, int64_t col, int64_t count, Bf16* out,
                    int64_t stride) {
  for (int64_t r = 0; r < ranks.padded; ++r) {
    for (int p = 0; p < ranks.parts; ++p) {
      Bf16* to = out + (p * ranks.padded + r) * stride;
      if (r == ranks.rank) {
        std::memset(to, 0, sizeof(Bf16) * count);
      } else if (ranks.parts == 1) {
        std::memcpy(to, static_cast<const Bf16*>(linear.lora_a) + r * linear.k() + col, sizeof(Bf16) * count);
      }
    }
    if (ranks.parts > 1 && r < ranks.rank) {
      split_row(static_cast<const float*>(linear.lora_a) + r * linear.k() + col, count, ranks.parts, out + r * stride,
                ranks.padded * stride);
    }
  }
}

// Rows of B [row, row + count) as rows of `split` [N][all].
inline void split_b(const LoraLinear& linear, const Ranks& ranks, int64_t row, int64_t count, Bf16* split) {
  Bf16* out = split + row * ranks.all;
  for (int64_t n = row; n < row + count; ++n, out += ranks.all) {
    if (ranks.parts > 1) {
      split_ranks(ranks, static_cast<const float*>(linear.lora_b) + n * ranks.rank, out);
    } else {
      std::memcpy(out, static_cast<const Bf16*>(linear.lora_b) + n * ranks.rank, sizeof(Bf16) * ranks.rank);
      if (ranks.padded != ranks.rank) out[ranks.rank].bits = 0;
    }
  }
}

// The mask of dropout for columns [col, col + count) of one row, in fp32; col is a multiple of kDropoutGroup.
inline void mask_row(const Dropout& dropout, int64_t row, int64_t row_length, int64_t col, int64_t count, float* out) {
  const uint32_t counter = static_cast<uint32_t>(row * ceil_div(row_length, kDropoutGroup));
  // The job writes to where the columns are in a whole row.
  void* whole = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(out) - sizeof(float) * static_cast<uintptr_t>(col));
  kAvx512Kernels.dropout_mask(dropout, Output{whole, Dtype::kFloat}, counter, col, col + count);
}

// out [rows][count] = x[row ..][col ..] with zeros where dropout has zeros; what remains is not scaled yet. `mask` has
// room for `count` floats.
FASTLORA_BF16 inline void drop(const Dropout& dropout, const Activations& x, int64_t row, int64_t rows, int64_t col,
                               int64_t count, float* mask, Bf16* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, out += stride) {
    mask_row(dropout, row + i, x.cols, col, count, mask);
    const Bf16* from = matrix(x).at(row + i, col);
    for (int64_t at = 0; at < count; at += kLanes) {
      const __mmask16 some = first_lanes(count - at);
      const __m512 kept = _mm512_maskz_loadu_ps(some, mask + at);
      const __mmask16 stays = _mm512_cmp_ps_mask(kept, _mm512_setzero_ps(), _CMP_NEQ_OQ);
      _mm256_mask_storeu_epi16(out + at, some, _mm256_maskz_loadu_epi16(some & stays, from + at));
    }
  }
}

}  // namespace
}  // namespace fastlora
#endif
