// y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias for 1 to 16 tokens: the second of two kernels, which adds up what the first
// (decode.h) left in the workspace.
//
//     h = sum over the splits of h,   y = (sum over the ranges of base) / factor + scaling · h Bᵀ + bias
//
// Everything is in fp32, in one order whatever the device does, and rounded once. Four lanes share a row of W: each
// takes four of every 16 ranks, then every fourth token. What does not depend on the first kernel is fetched before
// that kernel ends.
#pragma once

#include "device.h"
#include "layout.h"

namespace fastlora {
namespace gpu {

constexpr int kEpilogueThreads = 128;
constexpr int kEpilogueRows = kEpilogueThreads / 4;
constexpr int kRanks = 64;  // of h in shared memory at a time

FASTLORA_HD constexpr uint32_t epilogue_shared_bytes() { return kMaxTokens * kRanks * sizeof(float); }

FASTLORA_DEVICE const float* base_at(const Problem& p, int range, int token, int row) {
  return p.base + (int64_t{range} * p.shape.tokens + token) * p.shape.padded_rows() + row;
}

template <class T>
FASTLORA_DEVICE float load_either(const void* values, int64_t index, bool fp32) {
  if (fp32) return load_constant(static_cast<const float*>(values) + index);
  return widen(load_constant(static_cast<const uint16_t*>(values) + index), T{});
}

// Four neighbouring ranks of a row of B, zero beyond the last.
template <class T>
FASTLORA_DEVICE float4 load_b(const Problem& p, int row, int rank) {
  float4 b = {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t first = int64_t{row} * p.shape.rank + rank;
  if (rank + 4 <= p.shape.rank && p.shape.rank % 4 == 0) {
    if (p.adapters_fp32)
      return load_constant(reinterpret_cast<const float4*>(static_cast<const float*>(p.lora_b) + first));
    const uint2 four = load_constant(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.lora_b) + first));
    b.x = widen(static_cast<uint16_t>(four.x), T{});
    b.y = widen(static_cast<uint16_t>(four.x >> 16), T{});
    b.z = widen(static_cast<uint16_t>(four.y), T{});
    b.w = widen(static_cast<uint16_t>(four.y >> 16), T{});
    return b;
  }
  if (rank < p.shape.rank) b.x = load_either<T>(p.lora_b, first, p.adapters_fp32);
  if (rank + 1 < p.shape.rank) b.y = load_either<T>(p.lora_b, first + 1, p.adapters_fp32);
  if (rank + 2 < p.shape.rank) b.z = load_either<T>(p.lora_b, first + 2, p.adapters_fp32);
  if (rank + 3 < p.shape.rank) b.w = load_either<T>(p.lora_b, first + 3, p.adapters_fp32);
  return b;
}

// Adds up the splits of h for kRanks ranks, into shared memory [tokens, kRanks], zero beyond the last rank. Where there
// are fewer sums than threads, up to eight lanes share one.
FASTLORA_DEVICE void sum_h(const Problem& p, int r_begin) {
  const int rank = p.shape.padded_rank(), ranks = least(kRanks, rank - r_begin), splits = p.plan.h_splits();
  const int count = p.shape.tokens * ranks;
  int lanes = 1;
  while (lanes < 8 && 2 * lanes * count <= kEpilogueThreads) lanes *= 2;
  for (int done = 0; done < count; done += kEpilogueThreads / lanes) {
    const int i = done + thread_index() / lanes, token = i / ranks, r = r_begin + i % ranks;
    const bool mine = i < count && r < p.shape.rank;
    const float* h = p.h + int64_t{token} * rank + r;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = thread_index() % lanes; split < splits; split += lanes) {
      if (mine) sum += load_global(h + int64_t{split} * p.shape.tokens * rank);
    }
    for (int apart = 1; apart < lanes; apart *= 2) sum += shuffle_xor(sum, apart);
    if (i < count && thread_index() % lanes == 0) store_shared((token * kRanks + i % ranks) * 4, sum);
  }
}

// update[m] += h of token m times this lane's ranks of B, for kRanks ranks.
template <int kTokens>
FASTLORA_DEVICE void add_update(const Problem& p, int r_begin, const float4 (&b)[kRanks / 16],
                                float (&update)[kTokens]) {
#pragma unroll
  for (int i = 0; i < kRanks / 16; ++i) {
    if (r_begin + 16 * i >= p.shape.rank) break;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= p.shape.tokens) break;
      const float4 h = load_shared<float4>((m * kRanks + 16 * i + thread_index() % 4 * 4) * 4);
      update[m] += b[i].x * h.x + b[i].y * h.y + b[i].z * h.z + b[i].w * h.w;
    }
  }
}

template <class T, int kTokens>
FASTLORA_KERNEL(kEpilogueThreads, 1)
decode_epilogue(const Problem p) {
  constexpr int kMine = (kTokens + 3) / 4, kEarly = 4;  // tokens a lane finishes; ranges it reads while h is added up
  const int t = thread_index() % 4, tokens = p.shape.tokens;
  const int n = block_index() * kEpilogueRows + thread_index() / 4, row = least(n, p.shape.rows - 1);
  const float bias = p.bias == nullptr ? 0.0f : load_either<T>(p.bias, row, p.bias_fp32);
  float4 b[kRanks / 16];
#pragma unroll
  for (int i = 0; i < kRanks / 16; ++i) b[i] = load_b<T>(p, row, 16 * i + 4 * t);
  wait_for_previous_kernel();
  float early[kEarly][kMine] = {};
#pragma unroll
  for (int range = 0; range < kEarly; ++range) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (range < p.plan.ranges && 4 * i + t < tokens) early[range][i] = load_global(base_at(p, range, 4 * i + t, row));
    }
  }
  float update[kTokens] = {};
  for (int r_begin = 0; r_begin < p.shape.rank; r_begin += kRanks) {
    sum_h(p, r_begin);
    sync_block();
    add_update<kTokens>(p, r_begin, b, update);
    if (r_begin + kRanks >= p.shape.rank) break;
#pragma unroll
    for (int i = 0; i < kRanks / 16; ++i) b[i] = load_b<T>(p, row, r_begin + kRanks + 16 * i + 4 * t);
    sync_block();
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    update[m] += shuffle_xor(update[m], 1);
    update[m] += shuffle_xor(update[m], 2);
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int m = 4 * i + t;
    if (m >= tokens || n >= p.shape.rows) continue;
    float sum = early[0][i];
#pragma unroll
    for (int range = 1; range < kEarly; ++range) sum += early[range][i];
#pragma unroll 8
    for (int range = kEarly; range < p.plan.ranges; ++range) sum += load_global(base_at(p, range, m, row));
    float added = 0.0f;
#pragma unroll
    for (int j = 4 * i; j < least(4 * i + 4, kTokens); ++j) added = m == j ? update[j] : added;
    const float y = sum * (1.0f / level_factor<T>()) + p.scaling * added + bias;
    store_global(p.out + int64_t{m} * p.shape.rows + n, round_to(y, T{}));
  }
}

}  // namespace gpu
}  // namespace fastlora
