// A block of threads of the decode product: the place of each lane, and how the warps' sums are added up.
#pragma once

#include "device.h"
#include "layout.h"

namespace fastlora {
namespace gpu {

// The place of a lane: its warp's chunk, its place in the product's fragments, and the resulting shared memory offsets.
template <int kTokens, bool kShort>
struct Lane {
  int warp;
  int lane;
  int g;  // lane / 4: its row in either half of a tile, its token
  int t;  // lane % 4: its columns
  int range;
  int group;
  int k_begin;     // first column of the warp's chunk
  int blocks;      // blocks of 64 columns of the chunk that W has: 0 to 4
  uint32_t copy;   // in a slot: where the codes of row lane / 8 that it copies go
  uint32_t codes;  // in a slot: the first codes that it takes, row g, block 0
  uint32_t sum;    // in the sums: row g, token 2t

  FASTLORA_DEVICE explicit Lane(const Problem& p) {
    warp = same_in_warp(thread_index() / 32);
    lane = thread_index() % 32;
    g = lane / 4;
    t = lane % 4;
    range = block_index() / p.plan.groups;
    group = block_index() % p.plan.groups;
    const Part chunks = part_of(p.shape.chunks(), p.plan.ranges, range);
    k_begin = (chunks.begin + warp) * kChunk;
    const int left = chunks.begin + warp < chunks.end ? (p.shape.cols - k_begin) / kBlock : 0;
    blocks = least(left, kBlocks);
    copy = code_offset(lane / 8, lane % 8 * 16);
    codes = code_offset(g, first_column<kShort>(t, 0) / 2);
    sum = kSumsOffset + warp * groups_of(kTokens) * kSumsBytes + sum_offset(g, 2 * t);
  }
};

// Zeroes the sums, some of which belong to no warp.
template <int kTokens>
FASTLORA_DEVICE void clear_sums() {
  for (uint32_t i = thread_index() * 16; i < 2 * sums_bytes(kTokens); i += thread_count() * 16) {
    store_shared(kSumsOffset + i, uint4{0, 0, 0, 0});
  }
}

// Which of the two buffers of sums comes next, and which warp adds up.
template <int kTokens>
struct Turn {
  uint32_t buffer = 0;
  int warp = 0;

  FASTLORA_DEVICE void next(int warps) {
    buffer ^= sums_bytes(kTokens);
    warp = warp + 1 < warps ? warp + 1 : 0;
  }
};

// Adds up the warps' sums of one tile, and with two tokens the blocks', and writes 16 columns of `out` [tokens,
// stride]. Buffers take turns, so one barrier a call is enough.
template <int kTokens, bool kShort>
FASTLORA_DEVICE void publish(const Problem& p, const Lane<kTokens, kShort>& at, Turn<kTokens>& turn,
                             const float (&total)[groups_of(kTokens)][4], float* out, int stride) {
#pragma unroll
  for (int group = 0; group < groups_of(kTokens); ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mine = ((turn.buffer + at.sum) ^ sum_offset(0, i % 2)) + sum_offset(i / 2 * 8, 0);
      store_shared(mine + group * kSumsBytes, total[group][i]);
    }
  }
  sync_block();
  if (at.warp == turn.warp) {
    const int quad = at.lane / 8, token = at.lane % 8 ^ (quad & 1);
#pragma unroll 1
    for (int group = 0; group < groups_of(kTokens); ++group) {
      const uint32_t first = turn.buffer + kSumsOffset + group * kSumsBytes + at.lane * 16;
      float4 sum = load_shared<float4>(first);
#pragma unroll
      for (int warp = 1; warp < kMaxWarps; ++warp) {
        const float4 one = load_shared<float4>(first + warp * groups_of(kTokens) * kSumsBytes);
        sum = {sum.x + one.x, sum.y + one.y, sum.z + one.z, sum.w + one.w};
      }
      if (kTokens == 2) {
#pragma unroll
        for (int apart = 2; apart < 8; apart *= 2) {
          sum.x += shuffle_xor(sum.x, apart);
          sum.y += shuffle_xor(sum.y, apart);
          sum.z += shuffle_xor(sum.z, apart);
          sum.w += shuffle_xor(sum.w, apart);
        }
      }
      if (group * 8 + token < p.shape.tokens) {
        store_global(reinterpret_cast<float4*>(out + (group * 8 + token) * stride + quad * 4), sum);
      }
    }
  }
  turn.next(p.plan.warps);
}

}  // namespace gpu
}  // namespace fastlora
