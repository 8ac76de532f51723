// What each instruction set implements: jobs over a part of a weight, called from many threads at once.
#pragma once

#include <cstdint>

#include "../nf4.h"
#include "convert.h"

namespace fastlora {

enum class Dtype : int { kFloat = 0, kBf16 = 1, kHalf = 2 };

// No block is shorter than a group, and a group begins at a multiple of its length: it has one scale.
constexpr int kGroup = 32;
// Columns of A lie in panels [R][kPanel], zero beyond K, so that the rank runs through consecutive cache lines.
constexpr int kPanel = 64;
// Flat weights in one dequantize job; rows in one merge job.
constexpr int64_t kFlatJob = 1 << 16;
constexpr int kMergeRows = 32;
// Floats of A that a merge job works through at a time.
constexpr int64_t kStripFloats = 1 << 13;
// Rows of W in one product job, columns of W in one transposed job, rows of x a job holds accumulators for.
constexpr int kGemvRows = 16;
constexpr int kColumnTile = 512;
constexpr int kTokens = 16;

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

struct Kernels {
  void (*widen)(const void* x, Dtype dtype, int64_t count, float* out);
  void (*dequantize)(const Nf4Weight&, const Output&, int64_t begin, int64_t end);  // flat range, begin % 32 == 0
  void (*merge)(const Nf4Weight&, const Adapter&, const Output&, int64_t row_begin, int64_t row_end);
  void (*gemv)(const Nf4Weight&, const Product&, int64_t row_begin, int64_t row_end);
  void (*gemv_t)(const Nf4Weight&, const Product&, int64_t col_begin, int64_t col_end);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace fastlora
