// What each instruction set implements: jobs over a part of the result, called from many threads at once.
#pragma once

#include <cstdint>

#include "../lora.h"
#include "../nf4.h"
#include "convert.h"

namespace fastlora {

enum class Dtype : int { kFloat = 0, kBf16 = 1, kHalf = 2 };

// No block is shorter than a group, and a group begins at a multiple of its length, so it has one scale.
constexpr int kGroup = 32;
// Columns of A are in panels [R][kPanel], zero beyond K, so that the rank runs through consecutive cache lines.
constexpr int kPanel = 64;
// Flat weights in one dequantize job; rows in one merge job.
constexpr int64_t kFlatJob = 1 << 16;
constexpr int kMergeRows = 32;
// Floats of A that a merge job works through at a time.
constexpr int64_t kStripFloats = 1 << 13;
// Rows of W in one product job; columns of W in one transposed job, and rows that it sums separately; rows of x for
// which a job holds accumulators.
constexpr int kGemvRows = 16;
constexpr int kColumnTile = 512;
constexpr int kSummedRows = 256;
constexpr int kTokens = 16;
// The low-rank products: rows of x in one shrink job, and columns it widens at a time; columns and ranks in one outer
// job, rows it widens at a time, and rows it sums separately; columns in one job of the mask.
constexpr int kShrinkRows = 32;
constexpr int kShrinkStrip = 1024;
constexpr int kOuterColumns = 256;
constexpr int kOuterRanks = 64;
constexpr int kOuterRows = 64;
constexpr int kOuterStretch = 16 * kOuterRows;
constexpr int64_t kMaskJob = 1 << 14;
// K of A is padded to this, the widest vector.
constexpr int kWidest = 16;

struct Output {
  void* data;
  Dtype dtype;
};

struct Adapter {
  const float* panels;  // A as [ceil(K / kPanel)][R][kPanel]
  const float* lora_b;  // [N, R]
  int64_t rank;
  float scaling;
};

// y [tokens, N] = x Wᵀ with `inner` = K, or dx [tokens, K] = dy W with `inner` = N.
struct Product {
  const float* x;  // [tokens, stride], zero beyond `inner`
  int64_t stride;
  int64_t tokens;
  Output out;
};

// h [rows of x, rank] = scaling * x Aᵀ.
struct Shrink {
  Activations x;
  const Dropout* dropout;  // null for none
  const float* a;          // [rank, stride], zero from K to the next multiple of kWidest
  int64_t stride;
  int64_t rank;
  float scaling;
  float* out;
};

// d [rank, columns of x] = scaling * gᵀ x.
struct Outer {
  Activations x;
  const Dropout* dropout;  // null for none
  const float* g;          // [rows of x, rank]
  int64_t rank;
  float scaling;
  float* out;
  int64_t row_stride;
  int64_t col_stride;
};

// Codes and scales of a flat weight.
struct Quantize {
  const void* w;
  Dtype dtype;
  int64_t numel;
  int64_t log2_blocksize;
  uint8_t* codes;
  float* absmax;
};

// A rectangle of the result.
struct Tile {
  int64_t row_begin;
  int64_t row_end;
  int64_t col_begin;
  int64_t col_end;
};

struct Kernels {
  void (*widen)(const void* x, Dtype dtype, int64_t count, float* out);
  void (*dequantize)(const Nf4Weight&, const Output&, int64_t begin, int64_t end);  // flat range, begin % 32 == 0
  void (*merge)(const Nf4Weight&, const Adapter&, const Output&, int64_t row_begin, int64_t row_end);
  void (*gemv)(const Nf4Weight&, const Product&, int64_t row_begin, int64_t row_end);
  void (*gemv_t)(const Nf4Weight&, const Product&, int64_t col_begin, int64_t col_end);
  void (*quantize)(const Quantize&, int64_t block_begin, int64_t block_end);
  void (*lora_shrink)(const Shrink&, const Tile&);
  void (*lora_outer)(const Outer&, const Tile&);
  // Columns [begin, end) of one row of the mask, begin % 8 == 0; `counter` is that of the row's first group.
  void (*dropout_mask)(const Dropout&, const Output&, uint32_t counter, int64_t begin, int64_t end);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace fastlora
