// What the low-rank products of LoRA read: activations in their own dtype, and the mask of dropout as a seed.
//
// The mask is never stored. Columns are taken in groups of eight; group g of row m uses the 128 bits of a Philox-4x32
// call with seven rounds, key `seed` and counter m * ceil(cols / 8) + g (its low 32 bits), 16 bits an element, the low
// half of each word first. An element whose bits are below `threshold` is dropped; the others are scaled:
//
//     mask = bits < threshold ? 0 : 65536 / (65536 - threshold)
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

namespace fastlora {

constexpr int kDropoutGroup = 8;
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

// x [rows, cols], adjacent columns, rows `row_stride` elements apart; borrowed from the caller.
struct Activations {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int32_t dtype;
};

struct Dropout {
  uint64_t seed;
  int32_t threshold;  // 0 <= threshold < 65536

  float kept() const { return static_cast<float>(65536.0 / (65536 - threshold)); }
};

}  // namespace fastlora
