// dx = dy W + scaling · mask ∘ ((dy B) A), dA = scaling · (dy B)ᵀ x̃ and dB = scaling · dyᵀ h in bf16.
//
// As in forward, a tile of dx begins as the update, in fp32, and dy W is added to it. Columns of W become panels, two
// rows interleaved, in the second-level cache, and dy is broadcast, from a copy in tiles where many jobs read it. The
// gradients of the adapters are the same product over the tokens. Every element has one order of summation, whatever
// the threads: within blocks of a few hundred terms, then over the blocks.
#include "bf16_operands.h"
#include "linear.h"
#include "parallel.h"

#if FASTLORA_HAS_BF16
namespace fastlora {
namespace {

// How a product of up to `tokens` tokens is cut up.
struct Cut {
  int64_t tokens;   // of dx in one job
  int64_t columns;  // of dx in one job
  int64_t depth;    // rows of W in panels at a time
};
// For few tokens only the weight is read, and long stretches of its rows are read fastest.
constexpr int64_t kDepth = 512;
constexpr Cut kCuts[] = {{4, 2048, 32}, {64, 1024, 256}, {512, 256, kDepth}};
constexpr const Cut& kMany = kCuts[2];  // also for more tokens than one of its jobs has
// Rows of W whose products are summed separately: those of a panel, or of several shallow ones.
constexpr int64_t kSummed = 512;
constexpr bool is_shallow(int64_t depth) { return depth < kSummed / 2; }

constexpr const Cut& cut_for(int64_t tokens) {
  for (const Cut& cut : kCuts) {
    if (tokens <= cut.tokens) return cut;
  }
  return kMany;
}

// Tokens and bytes of dy in tiles at a time, at most.
constexpr int64_t kTiledTokens = 1024;
constexpr int64_t kTileBytes = 32 << 20;
// The same for dA and dB, which contract tokens, and the ranks whose sums a job holds.
constexpr int64_t kOuterColumns = 256;
constexpr int64_t kOuterDepth = 256;
constexpr int64_t kOuterRanks = 64;

static_assert(kTiledTokens % kMany.tokens == 0 && kMany.tokens % kWide == 0 && kWide % kTileRows == 0);
constexpr bool jobs_fit() {
  for (const Cut& cut : kCuts) {
    const int64_t sums = cut.tokens * (is_shallow(cut.depth) ? 2 : 1);
    if (4 * cut.columns * (sums + cut.depth / 2 + 1) > kJobRoom) return false;
  }
  return true;
}
static_assert(jobs_fit());

// Rows of dy a power of two apart evict one another from the caches. Where many jobs read them, they are copied to
// tiles, each of which is one stretch of memory: a number of tokens at a time, from `begin`, or none.
struct Tiles {
  int64_t tokens{};
  int64_t begin{};
  Bf16* data{};  // [tile of kTileRows][step of kDepth][kTileRows][kDepth]

  Bf16* at(int64_t token, int64_t row, int64_t N) const {
    return data + ((token - begin) / kTileRows * round_up(N, kDepth) + row) * kTileRows;
  }
};

struct Backward {
  const LoraLinear& linear;
  const Activations& dy;
  const Activations& x;
  const float* h;
  Ranks ranks;
  int64_t tokens_stride;  // tokens, room for a panel
  // Shared by all jobs; null if its result is not needed.
  Matrix a{};         // A [all][K]
  Pair* b_panels{};   // of B, [step of kStep][panel][pairs][kWide]
  float* sums{};      // dy B, [tokens][ranks.stride]
  Bf16* parts{};      // of scaling dy B, [tokens][extended]
  Bf16* g_columns{};  // the same, [all][tokens_stride]
  Bf16* h_columns{};  // parts of h, [all][tokens_stride]
  Tiles tiles{};

  // dy [token .. token + kTileRows)[row ..], both where a tile begins.
  Matrix dy_rows(int64_t token, int64_t row) const {
    if (tiles.tokens != 0) return {tiles.at(token, row, linear.n()), kDepth};
    return {matrix(dy).at(token, row), dy.row_stride};
  }
};

// Panels of B for the rows of one step.
void pack_b(const Backward& f, Bf16* split, int64_t row) {
  const int64_t depth = std::min(kStep, f.linear.n() - row);
  const Bf16* b = static_cast<const Bf16*>(f.linear.lora_b) + row * f.ranks.rank;
  if (!f.ranks.as_they_lie()) {
    split_b(f.linear, f.ranks, row, depth, split);
    b = split + row * f.ranks.all;
  }
  pack_along(b, f.ranks.all, depth, f.ranks.all, depth / 2 * kWide, f.b_panels + row / 2 * f.ranks.stride);
}

void scatter(const Backward& f, const Bf16* parts, int64_t token, Bf16* columns) {
  for (int64_t r = 0; r < f.ranks.all; ++r) columns[r * f.tokens_stride + token] = parts[r];
}

void copy_to_tiles(const Backward& f, int64_t first, int64_t count) {
  for (int64_t t = first; t < first + count; ++t) {
    for (int64_t row = 0; row < f.linear.n(); row += kDepth) {
      Bf16* to = f.tiles.at(t, row, f.linear.n()) + (t - f.tiles.begin) % kTileRows * kDepth;
      std::memcpy(to, matrix(f.dy).at(t, row), sizeof(Bf16) * std::min(kDepth, f.linear.n() - row));
    }
  }
}

// One group of tokens: their tiles, g = scaling dy B by token and by rank, and h by rank.
void take_in_tokens(const Backward& f, int64_t group) {
  const int64_t first = f.tiles.begin + group * kWide, count = std::min<int64_t>(kWide, f.dy.rows - first);
  if (f.tiles.tokens != 0) copy_to_tiles(f, first, count);
  if (f.ranks.rank == 0) return;
  const Ranks& ranks = f.ranks;
  float* values = reinterpret_cast<float*>(job_room());
  Bf16* parts = reinterpret_cast<Bf16*>(values + ranks.rank);
  for (int64_t t = first; t < first + count && f.h_columns != nullptr; ++t) {
    split_ranks(ranks, f.h + t * ranks.rank, parts);
    scatter(f, parts, t, f.h_columns);
  }
  if (f.sums == nullptr) return;
  float* sums = f.sums + first * ranks.stride;
  std::memset(sums, 0, sizeof(float) * count * ranks.stride);
  for (int64_t row = 0; row < f.linear.n(); row += kStep) {
    const int64_t depth = std::min(kStep, f.linear.n() - row);
    const Pair* b = f.b_panels + row / 2 * ranks.stride;
    for (int64_t r = 0; r < ranks.all; r += kWide, b += depth / 2 * kWide) {
      multiply(b, ranks.all - r, matrix(f.dy).at(first, row), count, f.dy.row_stride, depth / 2, sums + r,
               ranks.stride);
    }
  }
  for (int64_t t = first; t < first + count; ++t, sums += ranks.stride) {
    join(ranks, sums, f.linear.scaling, values);
    split_ranks(ranks, values, parts);
    extend(ranks, parts, f.parts + t * ranks.extended);
    scatter(f, parts, t, f.g_columns);
  }
}

struct Block {
  int64_t token;
  int64_t tokens;
  int64_t col;
  int64_t cols;
  int64_t depth;  // rows of W in panels at a time

  int64_t panel_stride() const { return (depth / 2 + 1) * kWide; }
};

// c [tokens][cols] = the update; panels of A are built on the way.
void add_update(const Backward& f, const Block& at, Pair* panels, float* c, int64_t c_stride) {
  if (f.ranks.rank == 0) return;
  const int64_t pairs = f.ranks.padded / 2, extended = f.ranks.extended / 2;
  for (int64_t j = 0; j < at.cols; j += kWide) {
    const int64_t some = std::min<int64_t>(kWide, at.cols - j);
    const Bf16* a = f.a.at(0, at.col + j);
    pack_along(a, f.a.stride, f.ranks.parts == 1 ? 2 * pairs : 4 * pairs, some, 0, panels);
    if (f.ranks.parts > 1) pack_along(a, f.a.stride, 2 * pairs, some, 0, panels + 2 * pairs * kWide);
    multiply(panels, some, f.parts + at.token * f.ranks.extended, at.tokens, f.ranks.extended, extended, c + j,
             c_stride);
  }
}

// c = mask ∘ c.
FASTLORA_BF16 void apply_mask(const Backward& f, const Block& at, float* mask, float* c, int64_t c_stride) {
  for (int64_t t = 0; t < at.tokens; ++t, c += c_stride) {
    mask_row(f.linear.dropout, at.token + t, f.linear.k(), at.col, at.cols, mask);
    for (int64_t j = 0; j < at.cols; ++j) c[j] *= mask[j];
  }
}

// Panels [panel][pairs][kWide] of rows of W.
void pack_weight(const Backward& f, const Block& at, int64_t row, int64_t rows, Pair* panels) {
  if (f.linear.weight == nullptr) {
    nf4_panels(f.linear.nf4, row, rows, at.col, at.cols, at.panel_stride(), panels);
    return;
  }
  const Matrix w = weight_rows(f.linear, row, rows, at.col, at.cols, nullptr, 0);
  pack_along(w.data, w.stride, rows, at.cols, at.panel_stride(), panels);
}

// c [tokens][cols] += dy W over rows [row, end) of W.
void multiply_rows(const Backward& f, const Block& at, int64_t row, int64_t end, Pair* panels, float* c,
                   int64_t c_stride) {
  for (; row < end; row += at.depth) {
    const int64_t rows = std::min(at.depth, end - row);
    pack_weight(f, at, row, rows, panels);
    for (int64_t t = 0; t < at.tokens; t += kTileRows) {
      const Matrix dy = f.dy_rows(at.token + t, row), following = f.dy_rows(at.token + t + kTileRows, row);
      const int64_t some = std::min<int64_t>(kTileRows, at.tokens - t);
      Ahead next(following.data, std::min<int64_t>(kTileRows, at.tokens - t - some), 2 * rows, 2 * dy.stride,
                 ceil_div(at.cols, kWide) * ceil_div(rows / 2, kStepPairs));
      const Pair* panel = panels;
      for (int64_t j = 0; j < at.cols; j += kWide, panel += at.panel_stride()) {
        multiply(panel, at.cols - j, dy.data, some, dy.stride, rows / 2, c + t * c_stride + j, c_stride, next);
      }
    }
  }
}

// dx [token ..][col ..].
FASTLORA_BF16 void multiply_block(const Backward& f, const Block& at, Bf16* dx) {
  const int64_t c_stride = round_up(at.cols, kWide), size = at.tokens * c_stride, K = f.linear.k(), N = f.linear.n();
  float* c = reinterpret_cast<float*>(job_room());
  float* part = c + size;
  Pair* panels = reinterpret_cast<Pair*>(is_shallow(at.depth) ? part + size : part);
  std::memset(c, 0, sizeof(float) * size);
  add_update(f, at, panels, c, c_stride);
  if (f.linear.drops()) apply_mask(f, at, reinterpret_cast<float*>(panels), c, c_stride);
  if (!is_shallow(at.depth)) multiply_rows(f, at, 0, N, panels, c, c_stride);
  for (int64_t row = 0; is_shallow(at.depth) && row < N; row += kSummed) {
    std::memset(part, 0, sizeof(float) * size);
    multiply_rows(f, at, row, std::min(row + kSummed, N), panels, part, c_stride);
    for (int64_t i = 0; i < size; ++i) c[i] += part[i];
  }
  store_rows(c, c_stride, at.tokens, at.cols, 1.0f, dx + at.token * K + at.col, K);
}

// c [ranks from `first`][columns of src from `col`] = columnsᵀ src, its parts added up.
FASTLORA_BF16 void outer_sums(const Backward& f, const Activations& src, const Dropout* dropout, const Bf16* columns,
                              int64_t first, int64_t ranks, int64_t col, int64_t cols, float* c) {
  const int64_t part = ranks * kOuterColumns;
  Pair* panels = reinterpret_cast<Pair*>(c + kMaxParts * kOuterRanks * kOuterColumns);
  float* mask = reinterpret_cast<float*>(panels + (kOuterDepth / 2 + 1) * kOuterColumns);
  Bf16* dropped = reinterpret_cast<Bf16*>(mask + kOuterColumns);
  std::memset(c, 0, sizeof(float) * f.ranks.parts * part);
  for (int64_t token = 0; token < src.rows; token += kOuterDepth) {
    const int64_t rows = std::min(kOuterDepth, src.rows - token), pairs = ceil_div(rows, 2);
    Matrix seen{matrix(src).at(token, col), src.row_stride};
    if (dropout != nullptr) {
      drop(*dropout, src, token, rows, col, cols, mask, dropped, kOuterColumns);
      seen = {dropped, kOuterColumns};
    }
    pack_along(seen.data, seen.stride, rows, cols, (pairs + 1) * kWide, panels);
    const Pair* panel = panels;
    for (int64_t j = 0; j < cols; j += kWide, panel += (pairs + 1) * kWide) {
      for (int p = 0; p < f.ranks.parts; ++p) {
        const Bf16* rows_of_part = columns + (p * f.ranks.padded + first) * f.tokens_stride + token;
        multiply(panel, cols - j, rows_of_part, ranks, f.tokens_stride, pairs, c + p * part + j, kOuterColumns);
      }
    }
  }
  for (int p = f.ranks.parts - 2; p >= 0; --p) {
    for (int64_t i = p * part; i < (p + 1) * part; ++i) c[i] += c[i + part];
  }
}

// Columns [col, col + cols) of dA [rank, K], or rows of dB [N, rank].
template <class T>
void outer_block(const Backward& f, bool of_b, int64_t col, int64_t cols, T* out) {
  const LoraLinear& linear = f.linear;
  const Dropout* dropout = of_b || !linear.drops() ? nullptr : &linear.dropout;
  float* c = reinterpret_cast<float*>(job_room());
  for (int64_t first = 0; first < f.ranks.rank; first += kOuterRanks) {
    const int64_t ranks = std::min(kOuterRanks, f.ranks.rank - first);
    outer_sums(f, of_b ? f.dy : f.x, dropout, of_b ? f.h_columns : f.g_columns, first, ranks, col, cols, c);
    if (of_b) {
      store_columns(c, kOuterColumns, ranks, cols, linear.scaling, out + col * f.ranks.rank + first, f.ranks.rank);
    } else {
      store_rows(c, kOuterColumns, ranks, cols, linear.kept(), out + first * linear.k() + col, linear.k());
    }
  }
}

int64_t outer_jobs(const void* gradient, int64_t columns) {
  return gradient != nullptr ? ceil_div(columns, kOuterColumns) : 0;
}

// Job `index` of the gradients of the adapters, those of A first.
void outer(const Backward& f, void* da, void* db, int64_t index) {
  const int64_t of_a = outer_jobs(da, f.linear.k());
  const bool b = index >= of_a;
  const int64_t col = (b ? index - of_a : index) * kOuterColumns;
  const int64_t cols = std::min(kOuterColumns, (b ? f.linear.n() : f.linear.k()) - col);
  void* out = b ? db : da;
  f.linear.adapter_dtype == 0 ? outer_block(f, b, col, cols, static_cast<float*>(out))
                              : outer_block(f, b, col, cols, static_cast<Bf16*>(out));
}

// A copy that only one or two jobs read does not pay.
int64_t tokens_in_tiles(int64_t M, int64_t N, int64_t K) {
  if (cut_for(M).depth != kDepth || K <= 2 * kMany.columns) return 0;
  const int64_t fit = kTileBytes / static_cast<int64_t>(sizeof(Bf16)) / round_up(std::max<int64_t>(N, 1), kDepth);
  return std::min({fit / kMany.tokens * kMany.tokens, kTiledTokens, round_up(M, kTileRows)});
}

// dx for as many tokens at a time as there are tiles for, and with the last of them dA and dB.
void multiply_all(Backward f, Bf16* dx, void* da, void* db, int threads) {
  const int64_t M = f.dy.rows, K = f.linear.k();
  const Cut& cut = cut_for(M);
  const int64_t cols = std::max<int64_t>(kWide, std::min(cut.columns, round_up(ceil_div(K, threads), kWide)));
  const int64_t across = ceil_div(K, cols);
  int64_t& begin = f.tiles.begin;
  do {
    const int64_t end = f.tiles.tokens != 0 ? std::min(begin + f.tiles.tokens, M) : M, tokens = end - begin;
    if (f.ranks.rank != 0 || f.tiles.tokens != 0) {
      parallel_for(ceil_div(tokens, kWide), threads, [&](int64_t group) { take_in_tokens(f, group); });
    }
    const int64_t blocks = dx != nullptr ? ceil_div(tokens, cut.tokens) * across : 0;
    const int64_t gradients = end == M ? outer_jobs(da, K) + outer_jobs(db, f.linear.n()) : 0;
    parallel_for(blocks, gradients, threads, [&](int64_t index) {
      if (index >= blocks) return outer(f, da, db, index - blocks);
      const int64_t token = begin + index / across * cut.tokens, col = index % across * cols;
      multiply_block(f, {token, std::min(cut.tokens, end - token), col, std::min(cols, K - col), cut.depth}, dx);
    });
    begin = end;
  } while (begin < M);
}

}  // namespace

bool linear_backward(const LoraLinear& linear, const Activations& dy, const Activations& x, const float* h, void* dx,
                     void* da, void* db, int threads) {
  const Ranks ranks(linear);
  const int64_t K = linear.k(), N = linear.n(), M = dy.rows;
  const int64_t M_of_g = ranks.rank != 0 && (dx != nullptr || da != nullptr) ? M : 0;
  const int64_t split_size = M_of_g == 0 || ranks.as_they_lie() ? 0 : ranks.all;
  Backward f{linear, dy, x, h, ranks, round_up(M, kWide)};
  const int64_t columns_size = ranks.all * f.tokens_stride;
  Layout layout;
  const auto of_a = layout.add<Bf16>(K * split_size);
  const auto of_b = layout.add<Bf16>(N * split_size);
  const auto b_panels = layout.add<Pair>(N / 2 * ranks.stride);
  const auto sums = layout.add<float>(M_of_g * ranks.stride);
  const auto parts = layout.add<Bf16>(M_of_g * ranks.extended);
  const auto columns = layout.add<Bf16>(2 * columns_size);
  f.tiles.tokens = dx != nullptr ? tokens_in_tiles(M, N, K) : 0;
  const auto tiles = layout.add<Bf16>(f.tiles.tokens * round_up(N, kDepth));
  if (!layout.allocate()) return false;
  f.tiles.data = layout.at(tiles);
  f.a = {static_cast<const Bf16*>(linear.lora_a), K};
  // The last pair of an odd number of tokens ends in zero.
  std::memset(layout.at(columns), 0, sizeof(Bf16) * 2 * columns_size);
  if (db != nullptr) f.h_columns = layout.at(columns) + columns_size;
  if (M_of_g != 0) {
    f.b_panels = layout.at(b_panels);
    f.sums = layout.at(sums);
    f.parts = layout.at(parts);
    f.g_columns = layout.at(columns);
    for_steps(N, worth(N * ranks.all / kLanes, threads), [&](int64_t row) { pack_b(f, layout.at(of_b), row); });
  }
  if (split_size != 0) {
    f.a = {layout.at(of_a), K};
    for_steps(K, threads,
              [&](int64_t col) { split_a(linear, ranks, col, std::min(kStep, K - col), layout.at(of_a) + col, K); });
  }
  multiply_all(f, static_cast<Bf16*>(dx), da, db, threads);
  return true;
}

}  // namespace fastlora
#endif
