// y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias in bf16; the expanded weight and the update are never in memory.
//
// h is computed before. The update goes first: each tile of y begins as bias + (scaling h) Bᵀ in fp32, and the base
// product is added to it, rounded once. So a small update keeps its bits, and costs no pass over y.
//
// More than kFewTokens tokens become panels (of kWide tokens), of which a block stays in the second-level cache, and
// rows of W are broadcast against them: y is summed transposed. Fewer are multiplied row by row (few_tokens.h).
#include "bf16_operands.h"
#include "few_tokens.h"
#include "linear.h"
#include "parallel.h"

#if FASTLORA_HAS_BF16
namespace fastlora {
namespace {

constexpr int64_t kTokenBlock = 512;  // tokens in panels at a time, at most
constexpr int64_t kRowBlock = 64;     // rows of W in one job
constexpr int64_t kDepth = 2048;      // columns contracted at a time: long stretches of rows are read fastest
constexpr int64_t kRoomStride = kDepth + kWide;
constexpr int64_t kRankStep = 4;      // rows of A in one job, where h is computed whole

struct Forward {
  const LoraLinear& linear;
  const Activations& x;
  const float* bias;
  Bf16* y;
  float* h;
  Ranks ranks;
  // Shared by all jobs.
  Matrix b{};        // B [N][all]
  Pair* a_panels{};  // of A, [step of kStep][panel][pairs][kWide]
  float* whole_h{};  // h [M][rank], where few tokens multiply fp32 adapters as they are; null where they take parts
  // For the tokens of one block.
  int64_t begin{};
  int64_t tokens{};
  float* sums{};     // x Aᵀ, [tokens][ranks.stride]
  Bf16* parts{};     // of scaling h, [tokens][extended]
  Pair* h_panels{};  // the same, [panel][extended / 2][kWide]
  Pair* x_panels{};  // of x, [step of kDepth][panel][pairs][kWide]
  Bf16* x_codes{};   // x in the order of the codes, [K / kCodeColumns][tokens][kCodeColumns], or null

  bool few() const { return tokens <= kFewTokens; }
  int64_t panels() const { return ceil_div(tokens, kWide); }
  // Where column `col` of a group of tokens is in x_panels.
  Pair* x_panel(int64_t group, int64_t col) const {
    const int64_t first = col / kDepth * kDepth, depth = std::min(kDepth, linear.k() - first);
    return x_panels + (first * panels() + group * depth + col - first) / 2 * kWide;
  }
};

// Panels of A for the columns of one step.
void pack_a(const Forward& f, Bf16* split, int64_t col) {
  const int64_t depth = std::min(kStep, f.linear.k() - col);
  Matrix a{static_cast<const Bf16*>(f.linear.lora_a) + col, f.linear.k()};
  if (!f.ranks.as_they_lie()) {
    Bf16* room = split + col * f.ranks.all;
    split_a(f.linear, f.ranks, col, depth, room, depth);
    a = {room, depth};
  }
  Pair* out = f.a_panels + col / 2 * f.ranks.stride;
  for (int64_t r = 0; r < f.ranks.all; r += kWide, out += depth / 2 * kWide) {
    pack_across(a.at(r, 0), a.stride, std::min<int64_t>(kWide, f.ranks.all - r), depth, out);
  }
}

// h of one group of tokens, and its parts that the update contracts with B.
void finish_h(const Forward& f, int64_t group, int64_t count) {
  const int64_t first = group * kWide, extended = f.ranks.extended;
  float* values = reinterpret_cast<float*>(job_room());
  Bf16* parts = reinterpret_cast<Bf16*>(values + f.ranks.rank);
  for (int64_t t = first; t < first + count; ++t) {
    join(f.ranks, f.sums + t * f.ranks.stride, f.linear.kept(), values);
    if (f.h != nullptr) std::memcpy(f.h + (f.begin + t) * f.ranks.rank, values, sizeof(float) * f.ranks.rank);
    for (int64_t r = 0; r < f.ranks.rank; ++r) values[r] *= f.linear.scaling;
    split_ranks(f.ranks, values, parts);
    extend(f.ranks, parts, f.parts + t * extended);
  }
  if (f.few()) return;
  pack_across(f.parts + first * extended, extended, count, extended, f.h_panels + first * extended / 2);
}

// h for a few tokens. Splitting fp32 adapters into parts would cost more than all products with them.
void multiply_by_a(const Forward& f, float* h, int threads) {
  const LoraLinear& linear = f.linear;
  const float* a = static_cast<const float*>(linear.lora_a);
  const Shrink shrink{f.x, linear.drops() ? &linear.dropout : nullptr, a, linear.k(), linear.rank, 1.0f, h};
  parallel_for(ceil_div(linear.rank, kRankStep), worth(f.x.rows * linear.rank * linear.k() / kLanes, threads),
               [&](int64_t index) {
                 const int64_t begin = index * kRankStep;
                 kAvx512Kernels.lora_shrink(shrink, {0, f.x.rows, begin, std::min(linear.rank, begin + kRankStep)});
               });
}

// Panels of one group of tokens, and h.
void take_in_tokens(const Forward& f, int64_t group) {
  const int64_t first = group * kWide, count = std::min<int64_t>(kWide, f.tokens - first);
  float* sums = f.sums + first * f.ranks.stride;
  float* mask = reinterpret_cast<float*>(job_room());
  Bf16* dropped = reinterpret_cast<Bf16*>(mask + kStep);
  for (int64_t t = 0; f.x_codes != nullptr && t < count; ++t) {
    Bf16* to = f.x_codes + t * kCodeColumns;
    in_order_of_codes(matrix(f.x).at(f.begin + t, 0), f.linear.k(), to, f.tokens * kCodeColumns);
  }
  if (f.whole_h != nullptr) return;
  std::memset(sums, 0, sizeof(float) * count * f.ranks.stride);
  for (int64_t col = 0; col < f.linear.k(); col += kStep) {
    const int64_t depth = std::min(kStep, f.linear.k() - col);
    Matrix x{matrix(f.x).at(f.begin + first, col), f.x.row_stride};
    if (!f.few()) pack_across(x.data, x.stride, count, depth, f.x_panel(group, col));
    if (f.linear.drops()) {
      drop(f.linear.dropout, f.x, f.begin + first, count, col, depth, mask, dropped, kStep + kWide);
      x = {dropped, kStep + kWide};
    }
    const Pair* a = f.a_panels + col / 2 * f.ranks.stride;
    for (int64_t r = 0; r < f.ranks.all; r += kWide, a += depth / 2 * kWide) {
      multiply(a, f.ranks.all - r, x.data, count, x.stride, depth / 2, sums + r, f.ranks.stride);
    }
  }
  if (f.ranks.rank != 0) finish_h(f, group, count);
}

// c [rows][tokens] += (scaling h Bᵀ)ᵀ for one panel of tokens.
void add_update(const Forward& f, int64_t row, int64_t rows, int64_t panel, int64_t columns, float* c,
                int64_t c_stride) {
  const Pair* h = f.h_panels + panel * kWide * f.ranks.extended / 2;
  const int64_t pairs = f.ranks.padded / 2;
  if (f.ranks.parts == 1) {
    multiply(h, columns, f.b.at(row, 0), rows, f.b.stride, pairs, c, c_stride);
    return;
  }
  multiply(h, columns, f.b.at(row, 0), rows, f.b.stride, 2 * pairs, c, c_stride);
  multiply(h + 2 * pairs * kWide, columns, f.b.at(row, 0), rows, f.b.stride, pairs, c, c_stride);
}

// y [all tokens of the block][row, end).
void multiply_block(const Forward& f, int64_t row, int64_t end) {
  float* c = reinterpret_cast<float*>(job_room());
  Bf16* decoded = reinterpret_cast<Bf16*>(c + kRowBlock * kTokenBlock);
  const int64_t c_stride = f.panels() * kWide, rows = end - row;
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(c + i * c_stride, c + (i + 1) * c_stride, f.bias != nullptr ? f.bias[row + i] : 0.0f);
  }
  for (int64_t p = 0; p < f.panels(); ++p) {
    add_update(f, row, rows, p, f.tokens - p * kWide, c + p * kWide, c_stride);
  }
  for (int64_t col = 0; col < f.linear.k(); col += kDepth) {
    const int64_t depth = std::min(kDepth, f.linear.k() - col);
    Matrix w[kRowBlock / kTileRows];
    // A panel stays in the second-level cache for all rows of the job, and the rows stay for all panels.
    for (int64_t p = 0; p < f.panels(); ++p) {
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t some = std::min<int64_t>(kTileRows, rows - i);
        Matrix& part = w[i / kTileRows];
        if (p == 0) part = weight_rows(f.linear, row + i, some, col, depth, decoded + i * kRoomStride, kRoomStride);
        multiply(f.x_panel(p, col), f.tokens - p * kWide, part.data, some, part.stride, depth / 2,
                 c + i * c_stride + p * kWide, c_stride);
      }
    }
  }
  store_columns(c, c_stride, rows, f.tokens, 1.0f, f.y + f.begin * f.linear.n() + row, f.linear.n());
}

// acc[t][i] += scaling h[t] . B[row + i].
FASTLORA_BF16 void add_update_to_few(const Forward& f, int64_t row, int64_t rows, __m512 (*acc)[kFewRows]) {
  if (f.whole_h == nullptr) {
    const int64_t padded = f.ranks.padded, both = std::min(f.ranks.parts, 2) * padded;
    const Bf16* b[kFewRows];
    point_at({f.b.at(row, 0), f.b.stride}, rows, b);
    dot(f.parts, f.ranks.extended, f.tokens, b, both, acc);
    if (f.ranks.parts > 1) dot(f.parts + both, f.ranks.extended, f.tokens, b, padded, acc);
    return;
  }
  const int64_t rank = f.ranks.rank;
  const float* b = static_cast<const float*>(f.linear.lora_b) + row * rank;
  const __m512 scaling = _mm512_set1_ps(f.linear.scaling);
  for (int64_t r = 0; r < rank; r += kLanes) {
    const __mmask16 some = first_lanes(rank - r);
    for (int64_t t = 0; t < f.tokens; ++t) {
      const __m512 h = _mm512_mul_ps(scaling, _mm512_maskz_loadu_ps(some, f.whole_h + t * rank + r));
      for (int64_t i = 0; i < rows; ++i) {
        acc[t][i] = _mm512_fmadd_ps(h, _mm512_maskz_loadu_ps(some, b + i * rank + r), acc[t][i]);
      }
    }
  }
}

// y [few tokens][row, end), rows of W one after another.
FASTLORA_BF16 void multiply_few(const Forward& f, int64_t row, int64_t end) {
  Bf16* room = reinterpret_cast<Bf16*>(job_room());
  const Matrix x = matrix(f.x);
  for (; row < end; row += kFewRows) {
    const int64_t rows = std::min<int64_t>(kFewRows, end - row);
    const Bf16* w[kFewRows];
    __m512 acc[kFewTokens][kFewRows];
    for (int64_t t = 0; t < f.tokens; ++t) {
      for (auto& lanes : acc[t]) lanes = _mm512_setzero_ps();
    }
    add_update_to_few(f, row, rows, acc);
    if (f.x_codes != nullptr) kDotCodes[f.tokens - 1](f.linear.nf4, row, rows, f.x_codes, acc);
    const int64_t step = f.linear.weight != nullptr ? f.linear.k() : kDepth;
    for (int64_t col = 0; f.x_codes == nullptr && col < f.linear.k(); col += step) {
      const int64_t depth = std::min(step, f.linear.k() - col);
      point_at(weight_rows(f.linear, row, rows, col, depth, room, kRoomStride), rows, w);
      dot(x.at(f.begin, col), x.stride, f.tokens, w, depth, acc);
    }
    for (int64_t t = 0; t < f.tokens; ++t) {
      Bf16* y = f.y + (f.begin + t) * f.linear.n() + row;
      for (int64_t i = 0; i < rows; ++i) {
        const float bias = f.bias != nullptr ? f.bias[row + i] : 0.0f;
        from_float(bias + _mm512_reduce_add_ps(acc[t][i]), y + i);
      }
    }
  }
}

}  // namespace

bool linear_forward(const LoraLinear& linear, const Activations& x, const float* bias, void* y, float* h, int threads) {
  if (x.rows == 0) return true;
  const Ranks ranks(linear);
  const int64_t K = linear.k(), N = linear.n();
  const int64_t block = round_up(ceil_div(x.rows, ceil_div(x.rows, kTokenBlock)), kWide);
  const bool whole = x.rows <= kFewTokens && ranks.parts > 1 && ranks.rank != 0 && K % kWidest == 0;
  const int64_t split_size = whole || ranks.as_they_lie() ? 0 : ranks.all;
  Forward f{linear, x, bias, static_cast<Bf16*>(y), h, ranks};
  Layout layout;
  const auto whole_h = layout.add<float>(whole && h == nullptr ? x.rows * ranks.rank : 0);
  const auto of_a = layout.add<Bf16>(K * split_size);
  const auto of_b = layout.add<Bf16>(N * split_size);
  const auto a_panels = layout.add<Pair>(K / 2 * ranks.stride);
  const auto sums = layout.add<float>(block * ranks.stride);
  const auto parts = layout.add<Bf16>(block * ranks.extended);
  const auto h_panels = layout.add<Pair>(block * ranks.extended / 2);
  const auto x_panels = layout.add<Pair>(x.rows <= kFewTokens ? 0 : block * K / 2);
  const bool from_codes = x.rows <= kFewTokens && is_read_from_codes(linear);
  const auto x_codes = layout.add<Bf16>(from_codes ? x.rows * K : 0);
  if (!layout.allocate()) return false;
  f.a_panels = layout.at(a_panels);
  f.sums = layout.at(sums);
  f.parts = layout.at(parts);
  f.h_panels = layout.at(h_panels);
  f.x_panels = layout.at(x_panels);
  if (from_codes) f.x_codes = layout.at(x_codes);
  f.b = {static_cast<const Bf16*>(linear.lora_b), ranks.rank};
  if (whole) {
    f.whole_h = h != nullptr ? h : layout.at(whole_h);
    multiply_by_a(f, f.whole_h, threads);
  } else {
    for_steps(K, worth(K * ranks.all / kLanes, threads), [&](int64_t col) { pack_a(f, layout.at(of_a), col); });
  }
  if (split_size != 0) {
    f.b = {layout.at(of_b), ranks.all};
    for_steps(N, threads, [&](int64_t row) { split_b(linear, ranks, row, std::min(kStep, N - row), layout.at(of_b)); });
  }
  for (f.begin = 0; f.begin < x.rows; f.begin += block) {
    f.tokens = std::min(block, x.rows - f.begin);
    parallel_for(f.panels(), threads, [&](int64_t group) { take_in_tokens(f, group); });
    parallel_for(ceil_div(N, kRowBlock), threads, [&](int64_t index) {
      const int64_t row = index * kRowBlock, end = std::min(N, row + kRowBlock);
      f.few() ? multiply_few(f, row, end) : multiply_block(f, row, end);
    });
  }
  return true;
}

}  // namespace fastlora
#endif
