// How the decode product is cut up: which block of threads takes which part, and where things are in shared memory.
//
// A tile is 16 rows of W, a chunk 256 columns: 128 bytes of codes a row. A warp keeps one chunk of x in registers and
// walks down the tiles; the warps of a block take neighbouring chunks and add their sums up once a tile. The columns
// are cut into `ranges`, one for each of `groups` blocks' worth of tiles:
//
//     block = range * groups + group,   chunks part_of(chunks, ranges, range),   tiles part_of(tiles, groups, group)
//
// Shared memory is used in lines of 256 bytes. Line e of the first 256 holds the pair of levels for which byte e of the
// codes stands, 32 times over in its first half: lane l reads word l, so no two lanes share a bank, and the address is
// the byte itself, moved up by eight bits, with 4l below it: one byte permutation. The second halves and further lines
// hold the codes in flight: slots of 16 half lines, one for each row of a tile.
#pragma once

#include <cstdint>

#include "../nf4.h"

namespace fastlora {
namespace gpu {

constexpr int kMaxTokens = 16;
constexpr int kTileRows = 16;
constexpr int kChunk = 256;
constexpr int kBlock = 64;  // columns that a scale covers at least, except in blocks of 32
constexpr int kBlocks = kChunk / kBlock;
constexpr int kMaxWarps = 8;
constexpr int kMaxThreads = 32 * kMaxWarps;
constexpr int kStages = 3;

constexpr uint32_t kLine = 256;
constexpr uint32_t kTableBytes = 256 * kLine;
constexpr uint32_t kSlotSpan = kTileRows * kLine;
constexpr int kSlotsBesideTable = kTableBytes / kSlotSpan;
constexpr uint32_t kSlotBytes = (kMaxWarps * kStages - kSlotsBesideTable + 1) / 2 * kSlotSpan;
constexpr uint32_t kCode2Offset = kTableBytes + kSlotBytes;
constexpr uint32_t kSumsOffset = kCode2Offset + 256 * sizeof(float);
constexpr uint32_t kSumsBytes = kTileRows * 8 * sizeof(float);  // a warp's tile for eight tokens

// The 16 levels are multiplied by this before they are rounded to 16 bits, and the sums divided by it at the end. Of
// all factors in [1, 2) these bring the rounded levels of normally distributed weights nearest to the true ones,
// without bias: the rms error is 0.58 (bf16) and 0.42 (fp16) of that of rounding each weight.
struct Bf16 {};
struct Half {};
template <class T>
FASTLORA_HD constexpr float level_factor();
template <>
FASTLORA_HD constexpr float level_factor<Bf16>() {
  return 1.24183f;
}
template <>
FASTLORA_HD constexpr float level_factor<Half>() {
  return 1.57519f;
}

// There are kernels for up to 2, 8 and 16 tokens, which take one or two products of eight columns.
FASTLORA_HD constexpr int groups_of(int tokens) { return tokens > 8 ? 2 : 1; }
// The warps' sums of a tile; there are two buffers of them.
FASTLORA_HD constexpr uint32_t sums_bytes(int tokens) { return kMaxWarps * groups_of(tokens) * kSumsBytes; }
FASTLORA_HD constexpr uint32_t shared_bytes(int tokens) { return kSumsOffset + 2 * sums_bytes(tokens); }

// Blocks of threads for which registers must leave room on a multiprocessor; from Hopper on, shared memory may hold
// two.
FASTLORA_HD constexpr int blocks_each([[maybe_unused]] int tokens, [[maybe_unused]] bool is_short) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return tokens <= 8 && !is_short ? 2 : 1;
#else
  return 1;
#endif
}

FASTLORA_HD constexpr uint32_t table_offset(int byte, int lane) { return byte * kLine + lane * 4; }

FASTLORA_HD constexpr uint32_t slot_offset(int stage, int warp) {
  const int slot = stage * kMaxWarps + warp;
  const int beyond = slot - kSlotsBesideTable;
  return beyond < 0 ? slot * kSlotSpan + kLine / 2 : kTableBytes + beyond / 2 * kSlotSpan + beyond % 2 * (kLine / 2);
}

// Byte `byte` of a row's 128 in its slot. Sixteen bytes stay together; they swap places by row, so that equal columns
// of eight rows are in different banks. Swapping flips bits of the offset: a bit flipped in `byte` is flipped there.
FASTLORA_HD constexpr uint32_t code_row_flips(int row) { return (row % 4 * 2 + row / 4 % 2) * 16; }
FASTLORA_HD constexpr uint32_t code_offset(int row, int byte) { return row * kLine + (byte ^ code_row_flips(row)); }

// The first of the eight neighbouring columns that lane t of a row takes in half h of a 64-column block. Where a scale
// covers 32 columns, a half must stay inside one scale.
template <bool kShort>
FASTLORA_HD constexpr int first_column(int t, int h) {
  return kShort ? 32 * h + 8 * t : 16 * t + 8 * h;
}

// Where a warp's sum for a row and a token of eight is among its 128: a lane adds up four rows at once.
FASTLORA_HD constexpr uint32_t sum_offset(int row, int token) {
  return (row / 4 * 8 + (token ^ (row / 4 & 1))) * 16 + row % 4 * 4;
}

FASTLORA_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FASTLORA_HD constexpr int least(int a, int b) { return a < b ? a : b; }

// How the work is distributed among blocks of threads.
struct Plan {
  int ranges;
  int groups;
  int warps;
  int lora_parts;  // into which a range's share of h is cut, so that blocks share the work: 1, 2 or 4

  FASTLORA_HD int blocks() const { return ranges * groups; }
  FASTLORA_HD int h_splits() const { return ranges * lora_parts; }
};

// Part i of `count` things cut into `parts`: the first count % parts parts get one more.
struct Part {
  int begin;
  int end;
};
FASTLORA_HD constexpr Part part_of(int count, int parts, int i) {
  const int each = count / parts, more = count % parts;
  const int begin = i * each + (i < more ? i : more);
  return {begin, begin + each + (i < more ? 1 : 0)};
}

struct Shape {
  int tokens;
  int rows;
  int cols;
  int rank;

  FASTLORA_HD int tiles() const { return ceil_div(rows, kTileRows); }
  FASTLORA_HD int chunks() const { return ceil_div(cols, kChunk); }
  FASTLORA_HD int padded_rows() const { return tiles() * kTileRows; }
  FASTLORA_HD int padded_rank() const { return ceil_div(rank, kTileRows) * kTileRows; }
  FASTLORA_HD int64_t base_floats(const Plan& plan) const { return int64_t{plan.ranges} * tokens * padded_rows(); }
  FASTLORA_HD int64_t h_floats(const Plan& plan) const { return int64_t{plan.h_splits()} * tokens * padded_rank(); }
};

// The arguments of both kernels.
struct Problem {
  Shape shape;
  Plan plan;
  Nf4Weight weight;
  bool nested;
  int log2_blocksize;
  const uint16_t* x;  // [tokens, cols], rows x_stride apart
  int64_t x_stride;
  const void* lora_a;  // [rank, cols], fp32 or of x's type
  const void* lora_b;  // [rows, rank]
  bool adapters_fp32;
  float scaling;
  const void* bias;  // [rows], fp32 or of x's type; null for none
  bool bias_fp32;
  uint16_t* out;  // [tokens, rows]
  float* base;    // [ranges, tokens, padded rows]
  float* h;       // [h_splits, tokens, padded rank]
};

// The fewest ranges that leave no multiprocessor with more than 5% above the least possible work.
inline Plan make_plan(const Shape& shape, int multiprocessors, int blocks_each) {
  Plan best = {};
  int64_t best_work = INT64_MAX;
  for (int ranges = ceil_div(shape.chunks(), kMaxWarps); ranges <= shape.chunks(); ++ranges) {
    const int warps = ceil_div(shape.chunks(), ranges);
    int groups = multiprocessors * blocks_each / ranges;
    if (groups < 1) groups = 1;
    if (groups > shape.tiles()) groups = shape.tiles();
    const int64_t work = int64_t{ceil_div(ranges * groups, multiprocessors)} * ceil_div(shape.tiles(), groups) * warps;
    if (best_work != INT64_MAX && work * 20 >= best_work * 19) continue;
    best_work = work;
    best = {ranges, groups, warps, kBlocks};
  }
  // Every block of the second kernel reads all parts of h: keep them below 32 KB.
  while (best.lora_parts > 1 && shape.h_floats(best) > 8192) best.lora_parts /= 2;
  return best;
}

}  // namespace gpu
}  // namespace fastlora
