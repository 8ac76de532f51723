// h = x Aᵀ for 1 to 16 tokens, in pieces that blocks of the decode product compute on the way.
//
// A piece is 16 ranks times a part of the columns of a block's warps; A is the left operand, x the right one, in tf32:
// 16-bit values are exact in it, and fp32 adapters go as an upper and a lower part, 2^-22 from exact.
#pragma once

#include "block.h"
#include "device.h"
#include "layout.h"

namespace fastlora {
namespace gpu {

// 16 neighbouring values of a row of A or x, as fp32: in memory either fp32 or T.
struct Sixteen {
  float value[16];
};

template <class T>
FASTLORA_DEVICE Sixteen load_sixteen(const void* row, int column, bool fp32) {
  Sixteen out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (fp32) {
      const float4 four = load_constant(reinterpret_cast<const float4*>(static_cast<const float*>(row) + column) + i);
      out.value[4 * i] = four.x;
      out.value[4 * i + 1] = four.y;
      out.value[4 * i + 2] = four.z;
      out.value[4 * i + 3] = four.w;
    } else {
      const uint2 four = load_constant(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(row) + column) + i);
      out.value[4 * i] = widen(static_cast<uint16_t>(four.x), T{});
      out.value[4 * i + 1] = widen(static_cast<uint16_t>(four.x >> 16), T{});
      out.value[4 * i + 2] = widen(static_cast<uint16_t>(four.y), T{});
      out.value[4 * i + 3] = widen(static_cast<uint16_t>(four.y >> 16), T{});
    }
  }
  return out;
}

// total += 16 rows of A times x over 64 columns.
template <class T, int kTokens, bool kShort>
FASTLORA_DEVICE void multiply_lora(const Problem& p, const Lane<kTokens, kShort>& at, int r_begin, int k_begin,
                                   float (&total)[groups_of(kTokens)][4]) {
  const int column = k_begin + at.t * 16;
  const int size = p.adapters_fp32 ? 4 : 2;
  Sixteen a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = least(r_begin + at.g + 8 * i, p.shape.rank - 1);
    const uint8_t* first = static_cast<const uint8_t*>(p.lora_a) + int64_t{row} * p.shape.cols * size;
    a[i] = load_sixteen<T>(first, column, p.adapters_fp32);
  }
#pragma unroll
  for (int group = 0; group < groups_of(kTokens); ++group) {
    const int token = group * 8 + at.g;
    Sixteen x = {};
    if (token < p.shape.tokens) x = load_sixteen<T>(p.x + token * p.x_stride, column, false);
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const float whole[4] = {a[0].value[i], a[1].value[i], a[0].value[i + 1], a[1].value[i + 1]};
      float upper[4], lower[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        upper[j] = float_from_bits(bits_from_float(whole[j]) & 0xffffe000u);
        lower[j] = whole[j] - upper[j];
      }
      multiply_tf32(total[group], upper, x.value[i], x.value[i + 1]);
      if (p.adapters_fp32) multiply_tf32(total[group], lower, x.value[i], x.value[i + 1]);
    }
  }
}

// This block's share of h: pieces of 16 ranks by part of the warps' chunks. The blocks with the fewest tiles begin.
template <class T, int kTokens, bool kShort>
FASTLORA_DEVICE void share_of_h(const Problem& p, const Lane<kTokens, kShort>& at, Turn<kTokens>& turn) {
  const int parts = p.plan.lora_parts, blocks = kBlocks / parts, rank = p.shape.padded_rank();
  for (int piece = p.plan.groups - 1 - at.group; piece < rank / kTileRows * parts; piece += p.plan.groups) {
    const int part = piece % parts, r_begin = piece / parts * kTileRows;
    float total[groups_of(kTokens)][4] = {};
    for (int block = part * blocks; block < least((part + 1) * blocks, at.blocks); ++block) {
      multiply_lora<T>(p, at, r_begin, at.k_begin + block * kBlock, total);
    }
    const int64_t split = at.range * parts + part;
    publish(p, at, turn, total, p.h + split * p.shape.tokens * rank + r_begin, rank);
  }
}

}  // namespace gpu
}  // namespace fastlora
