// y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias for 1 to 16 tokens, W in NF4 as it is in memory: the first of two kernels.
//
// It reads every packed byte once. A tile of W is the left operand of the tensor cores' product, and the tokens are its
// eight (or twice eight) columns: a byte, which is two weights, costs one byte permutation and one load from a table of
// pairs, and the product is almost free. Levels are 16-bit, times a factor that reduces their error (layout.h); the
// scale, in fp32, multiplies the sum over its block. Before the tiles some blocks of threads compute pieces of h
// (shrink.h). All sums go to a workspace in fp32:
//
//     base [ranges, tokens, rows]    h [ranges * lora_parts, tokens, rank]    rows and rank padded to 16
//
// The second kernel, epilogue.h, adds them up. Where scales serve 32 columns (kShort), each half of a block of 64 has
// its own.
#pragma once

#include "block.h"
#include "device.h"
#include "layout.h"
#include "shrink.h"

namespace fastlora {
namespace gpu {

// Fills the table of pairs and the levels of nested scales.
template <class T, int kTokens, bool kShort>
FASTLORA_DEVICE void fill_tables(const Problem& p, const Lane<kTokens, kShort>& at) {
  static constexpr Nf4Code kCode = nf4_code();
  const uint32_t bits = round_to(kCode.value[at.lane % 16] * level_factor<T>(), T{});
  for (int quad = at.warp; quad < 64; quad += p.plan.warps) {
    const int byte = quad * 4 + at.lane / 8;
    const uint32_t first = shuffle(bits, byte / 16), second = shuffle(bits, byte % 16);
    const uint32_t pair = first | second << 16;
    store_shared(table_offset(byte, at.lane % 8 * 4), uint4{pair, pair, pair, pair});
  }
  if (!p.nested) return;
  for (int i = thread_index(); i < 256; i += thread_count()) {
    store_shared(kCode2Offset + i * 4, load_constant(p.weight.code2 + i));
  }
}

// Starts the copy of a tile's codes into a slot. Every lane commits, whether it had anything to copy or not.
template <int kTokens, bool kShort>
FASTLORA_DEVICE void copy_codes(const Problem& p, const Lane<kTokens, kShort>& at, int tile, int tile_end,
                                uint32_t slot) {
  const int byte = at.lane % 8 * 16;
  if (tile < tile_end && byte < at.blocks * (kBlock / 2)) {
    const uint8_t* column = p.weight.codes + (at.k_begin / 2 + byte);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = least(tile * kTileRows + at.lane / 8 + 4 * i, p.shape.rows - 1);
      copy_async(slot + (at.copy ^ code_row_flips(4 * i)) + 4 * i * kLine, column + int64_t{row} * (p.shape.cols / 2));
    }
  }
  commit_copies();
}

// The scales of block t of a tile's rows g and g + 8, as they are in memory. Two scales of 32 columns share their
// second level, because the first has an even index.
template <bool kShort>
struct RawScales {
  static constexpr int kEach = kShort ? 2 : 1;
  uint32_t level[2][kEach];
  float outer[2];
  float plain[2][kEach];
};

template <bool kShort>
struct Scales {
  float value[2][RawScales<kShort>::kEach];
};

template <int kTokens, bool kShort>
FASTLORA_DEVICE void fetch_scales(const Problem& p, const Lane<kTokens, kShort>& at, int tile, RawScales<kShort>& raw) {
  if (at.blocks == 0) return;
  const int column = at.k_begin + least(at.t, at.blocks - 1) * kBlock;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = least(tile * kTileRows + at.g + 8 * i, p.shape.rows - 1);
    const uint32_t first = row * (p.shape.cols >> p.log2_blocksize) + (column >> p.log2_blocksize);
    if (p.nested) raw.outer[i] = load_constant(p.weight.absmax2 + first / kBlocksPerScale2);
#pragma unroll
    for (int j = 0; j < RawScales<kShort>::kEach; ++j) {
      if (p.nested) {
        raw.level[i][j] = load_constant(static_cast<const uint8_t*>(p.weight.absmax) + first + j);
      } else {
        raw.plain[i][j] = load_constant(static_cast<const float*>(p.weight.absmax) + first + j);
      }
    }
  }
}

template <bool kShort>
FASTLORA_DEVICE Scales<kShort> decode_scales(const Problem& p, const RawScales<kShort>& raw, float offset) {
  Scales<kShort> scales;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < RawScales<kShort>::kEach; ++j) {
      scales.value[i][j] = raw.plain[i][j];
      if (p.nested) {
        const float level = load_shared<float>(kCode2Offset + raw.level[i][j] * 4);
        scales.value[i][j] = nf4_nested_scale(level, raw.outer[i], offset);
      }
    }
  }
  return scales;
}

// Right operands of a chunk: x of token g, zero beyond the last token and the last column. One or two tokens leave
// columns unused, which then separate the blocks: column g is token g % 2 in block g / 2 and zero in the others, so
// the sums of block t come to lane t of a row, the lane that has its scale.
template <int kTokens>
struct Fragments {
  uint32_t x[groups_of(kTokens)][kBlocks][8];
};

template <int kTokens, bool kShort>
FASTLORA_DEVICE void load_fragments(const Problem& p, const Lane<kTokens, kShort>& at, Fragments<kTokens>& fragments) {
#pragma unroll
  for (int group = 0; group < groups_of(kTokens); ++group) {
    const int token = kTokens == 2 ? at.g % 2 : group * 8 + at.g;
    const uint16_t* x = p.x + token * p.x_stride + at.k_begin;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 eight = {0, 0, 0, 0};
        const bool mine = kTokens > 2 || block == at.g / 2;
        if (mine && token < p.shape.tokens && block < at.blocks) {
          eight = load_constant(reinterpret_cast<const uint4*>(x + block * kBlock + first_column<kShort>(at.t, h)));
        }
        uint32_t* words = fragments.x[group][block] + 4 * h;
        words[0] = eight.x;
        words[1] = eight.y;
        words[2] = eight.z;
        words[3] = eight.w;
      }
    }
  }
}

// The codes that a lane takes from a row's block of 64: two words of eight, at these places.
template <bool kShort>
FASTLORA_DEVICE uint2 load_codes(uint32_t first, uint32_t second) {
  if (!kShort) return load_shared<uint2>(first);
  return {load_shared<uint32_t>(first), load_shared<uint32_t>(second)};
}

// The pair of levels for byte j of `codes`; lane_word is 4 * lane.
FASTLORA_DEVICE uint32_t look_up(uint32_t codes, int j, uint32_t lane_word) {
  return load_shared<uint32_t>(permute_bytes(codes, lane_word, 0x5504u | j << 4));
}

template <int kTokens>
FASTLORA_DEVICE void add_scaled(float (&total)[groups_of(kTokens)][4], const float (&part)[groups_of(kTokens)][4],
                                float low, float high) {
#pragma unroll
  for (int group = 0; group < groups_of(kTokens); ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[group][i] += part[group][i] * (i < 2 ? low : high);
  }
}

// part += 32 columns of a tile's rows g and g + 8 times x, from one word of codes each.
template <class T, int kTokens>
FASTLORA_DEVICE void multiply_words(uint32_t low, uint32_t high, uint32_t lane_word,
                                    const Fragments<kTokens>& fragments, int block, int h,
                                    float (&part)[groups_of(kTokens)][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t a[4] = {look_up(low, 2 * i, lane_word), look_up(high, 2 * i, lane_word),
                           look_up(low, 2 * i + 1, lane_word), look_up(high, 2 * i + 1, lane_word)};
#pragma unroll
    for (int group = 0; group < groups_of(kTokens); ++group) {
      const uint32_t* x = fragments.x[group][block] + 4 * h + 2 * i;
      multiply(part[group], a, x[0], x[1], T{});
    }
  }
}

// total += a tile's chunk times x, in the layout of the product's accumulator.
template <class T, int kTokens, bool kShort>
FASTLORA_DEVICE void multiply_tile(const Lane<kTokens, kShort>& at, uint32_t slot, const Scales<kShort>& scales,
                                   const Fragments<kTokens>& fragments, float (&total)[groups_of(kTokens)][4]) {
  constexpr int kLast = RawScales<kShort>::kEach - 1;
  const uint32_t lane_word = at.lane * 4;
  float part[2][groups_of(kTokens)][4] = {};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const uint32_t first = (slot + at.codes) ^ block * (kBlock / 2), second = first ^ 16;
    const uint2 low = load_codes<kShort>(first, second);
    const uint2 high = load_codes<kShort>(first + 8 * kLine, second + 8 * kLine);
    multiply_words<T, kTokens>(low.x, high.x, lane_word, fragments, block, 0, part[0]);
    multiply_words<T, kTokens>(low.y, high.y, lane_word, fragments, block, 1, part[kTokens == 2 ? 1 : kLast]);
    if constexpr (kTokens > 2) {
      const int source = at.lane - at.t + block;
#pragma unroll
      for (int j = 0; j <= kLast; ++j) {
        add_scaled<kTokens>(total, part[j], shuffle(scales.value[0][j], source), shuffle(scales.value[1][j], source));
#pragma unroll
        for (int i = 0; i < groups_of(kTokens) * 4; ++i) part[j][i / 4][i % 4] = 0.0f;
      }
    }
  }
  if constexpr (kTokens == 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = least(h, kLast);
      add_scaled<kTokens>(total, part[h], scales.value[0][j], scales.value[1][j]);
    }
  }
}

template <class T, int kTokens, bool kShort>
FASTLORA_KERNEL(kMaxThreads, blocks_each(kTokens, kShort))
decode_products(const Problem p) {
  const Lane<kTokens, kShort> at(p);
  const Part tiles = part_of(p.shape.tiles(), p.plan.groups, at.group);
  uint32_t slot[kStages];
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    slot[i] = slot_offset(i, at.warp);
    if (i < kStages - 1) copy_codes(p, at, tiles.begin + i, tiles.end, slot[i]);
  }
  RawScales<kShort> raw = {};
  fetch_scales(p, at, tiles.begin, raw);
  const float offset = p.nested ? load_constant(p.weight.offset) : 0.0f;
  clear_sums<kTokens>();
  sync_block();
  let_next_kernel_start();
  Turn<kTokens> turn;
  share_of_h<T>(p, at, turn);
  Fragments<kTokens> fragments;
  load_fragments(p, at, fragments);
  fill_tables<T>(p, at);
  sync_block();
  const int stride = p.shape.padded_rows();
  float* out = p.base + int64_t{at.range} * p.shape.tokens * stride + tiles.begin * kTileRows;
  for (int tile = tiles.begin; tile < tiles.end; ++tile, out += kTileRows) {
    wait_copies<kStages - 2>();
    sync_warp();
    copy_codes(p, at, tile + kStages - 1, tiles.end, slot[kStages - 1]);
    const Scales<kShort> scales = decode_scales(p, raw, offset);
    fetch_scales(p, at, tile + 1, raw);
    float total[groups_of(kTokens)][4] = {};
    if (at.blocks > 0) multiply_tile<T>(at, slot[0], scales, fragments, total);
    publish(p, at, turn, total, out, stride);
    const uint32_t used = slot[0];
#pragma unroll
    for (int i = 0; i + 1 < kStages; ++i) slot[i] = slot[i + 1];
    slot[kStages - 1] = used;
  }
}

}  // namespace gpu
}  // namespace fastlora
