// NF4 as bitsandbytes stores it: index arithmetic, codebook and scales, shared by every back end.
//
// A weight of N x K values is N*K four-bit codes, two a byte, the high nibble first. Blocks of `blocksize`
// codes run flat over the whole tensor, so a block may begin in one row and end in the next:
//
//     value[i] = code[q[i]] * absmax[i / blocksize]
//
// With double quantization absmax itself is 8-bit, in blocks of 256:
//
//     absmax[b] = code2[u8[b]] * absmax2[b / 256] + offset
//
// Both formulas are separately rounded fp32 operations. Compile with -ffp-contract=off: a contracted multiply-add
// rounds only once and gives other bits than bitsandbytes.
//
// Source: arXiv:2305.14314, section 3.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTLORA_HD __host__ __device__
#else
#define FASTLORA_HD
#endif

namespace fastlora {

constexpr int kBlocksPerScale2 = 256;

struct Nf4Code {
  float value[16];
};

FASTLORA_HD constexpr Nf4Code nf4_code() {
  return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
           -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
           0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
           1.0f}};
}

// One quantized weight, borrowed from the caller. `absmax` is float[blocks] where `absmax2` is null (plain
// scales), else uint8_t[blocks] (nested scales). This is also the layout the C interface passes.
struct Nf4Weight {
  const uint8_t* codes;
  const void* absmax;
  const float* absmax2;
  const float* code2;
  const float* offset;
  int64_t rows;
  int64_t cols;
  int64_t log2_blocksize;

  FASTLORA_HD int64_t numel() const { return rows * cols; }
};

// Product and sum are rounded separately.
FASTLORA_HD inline float nf4_nested_scale(float level, float outer, float offset) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(level, outer), offset);
#else
  const float product = level * outer;
  return product + offset;
#endif
}

FASTLORA_HD inline float nf4_scale(const Nf4Weight& weight, int64_t block) {
  if (weight.absmax2 == nullptr) return static_cast<const float*>(weight.absmax)[block];
  const float level = weight.code2[static_cast<const uint8_t*>(weight.absmax)[block]];
  return nf4_nested_scale(level, weight.absmax2[block / kBlocksPerScale2], *weight.offset);
}

FASTLORA_HD inline int nf4_index(const Nf4Weight& weight, int64_t flat) {
  const int pair = weight.codes[flat / 2];
  return flat % 2 == 0 ? pair >> 4 : pair & 15;
}

// The scalar definition of the format; the vector code gives the same bits.
FASTLORA_HD inline float nf4_value(const Nf4Weight& weight, int64_t flat) {
  return nf4_code().value[nf4_index(weight, flat)] * nf4_scale(weight, flat >> weight.log2_blocksize);
}

}  // namespace fastlora
