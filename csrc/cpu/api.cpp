// The C entry points: choose the instruction set, prepare what the jobs share, distribute the jobs.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../fastlora_cpu.h"
#include "kernels.h"
#include "linear.h"
#include "parallel.h"

namespace fastlora {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

int find_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kF16c = 1u << 29;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !(ecx & kF16c)) return 0;
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  return has_bf16_products() ? 3 : 2;
#else
  return 0;
#endif
}

// Queried once: on a virtual machine the query itself takes microseconds.
int best_isa() {
  static const int best = find_best_isa();
  return best;
}

const Kernels* kernels_for(int isa) {
  if (isa < 0 || isa > best_isa()) return nullptr;
#if defined(__x86_64__)
  if (isa >= 2) return &kAvx512Kernels;
  if (isa == 1) return &kAvx2Kernels;
#endif
  return &kPortableKernels;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer aligned_buffer(int64_t count) {
  void* p = nullptr;
  return Buffer(posix_memalign(&p, 64, sizeof(float) * std::max<int64_t>(count, 1)) == 0 ? static_cast<float*>(p)
                                                                                         : nullptr);
}

// A [R, K] into panels [ceil(K / kPanel)][R][kPanel], zero beyond K.
void pack_panels(const float* lora_a, int64_t rank, int64_t cols, int threads, float* panels) {
  parallel_for(ceil_div(cols, kPanel), threads, [&](int64_t index) {
    const int64_t width = std::min<int64_t>(kPanel, cols - index * kPanel);
    for (int64_t r = 0; r < rank; ++r) {
      float* row = panels + (index * rank + r) * kPanel;
      std::memcpy(row, lora_a + r * cols + index * kPanel, sizeof(float) * width);
      std::memset(row + width, 0, sizeof(float) * (kPanel - width));
    }
  });
}

// Waking a thread costs as much as some tens of thousands of weights.
int useful_threads(const Nf4Weight& weight, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + (weight.numel() >> 16)));
}

using ProductJob = void (*)(const Nf4Weight&, const Product&, int64_t begin, int64_t end);

// x [tokens, inner] as fp32 and zero beyond `inner`, then one job for each `step` of the `outer` dimension.
int run_product(const Nf4Weight& weight, const void* x, Dtype x_dtype, int64_t tokens, int64_t inner, int64_t outer,
                int64_t step, const Output& out, const Kernels& kernels, ProductJob job, int threads) {
  // A tile of tokens is read side by side: rows a tile apart modulo the page leave each its own cache sets.
  const int64_t stride = ceil_div(inner, 1024) * 1024 + kColumnTile;
  const Buffer wide = aligned_buffer(tokens * stride);
  if (!wide) return FASTLORA_NO_MEMORY;
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = wide.get() + t * stride;
    kernels.widen(static_cast<const char*>(x) + t * inner * element_size(x_dtype), x_dtype, inner, row);
    std::memset(row + inner, 0, sizeof(float) * (stride - inner));
  }
  const Product product{wide.get(), stride, tokens, out};
  parallel_for(ceil_div(outer, step), useful_threads(weight, threads),
               [&](int64_t index) { job(weight, product, index * step, std::min(outer, (index + 1) * step)); });
  return FASTLORA_OK;
}

// Multiply-adds of a low-rank product that are worth waking one more thread for.
int threads_for_lora(const Activations& x, int64_t rank, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + (x.rows * x.cols * (rank + 4) >> 18)));
}

// A [rank, cols] of any strides into rows of `stride` floats, zero from cols on.
void pack_rows(const float* a, int64_t rank, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t stride,
               int threads, float* out) {
  constexpr int64_t kCols = 256, kRanks = 16;
  parallel_for(ceil_div(cols, kCols), threads, [&](int64_t index) {
    const int64_t begin = index * kCols, end = std::min(cols, begin + kCols);
    for (int64_t first = 0; first < rank; first += kRanks) {
      for (int64_t r = first; r < std::min(rank, first + kRanks); ++r) {
        for (int64_t k = begin; k < end; ++k) out[r * stride + k] = a[r * row_stride + k * col_stride];
      }
    }
  });
  for (int64_t r = 0; r < rank; ++r) std::fill(out + r * stride + cols, out + (r + 1) * stride, 0.0f);
}

int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// Runs job over the tiles that a result of rows x cols is cut into.
template <class Body>
void for_tiles(int64_t rows, int64_t row_step, int64_t cols, int64_t col_step, int threads, const Body& body) {
  const int64_t across = ceil_div(cols, col_step);
  parallel_for(ceil_div(rows, row_step) * across, threads, [&](int64_t index) {
    const int64_t row = index / across * row_step, col = index % across * col_step;
    body(Tile{row, std::min(rows, row + row_step), col, std::min(cols, col + col_step)});
  });
}

}  // namespace
}  // namespace fastlora

using namespace fastlora;

int fastlora_abi_version() { return FASTLORA_ABI_VERSION; }

int fastlora_best_isa() { return best_isa(); }

const char* fastlora_threading() { return threading_name(); }

int fastlora_nf4_dequantize(const Nf4Weight* weight, const float* lora_a, const float* lora_b, int64_t rank,
                            float scaling, void* out, int out_dtype, int isa, int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  const int64_t numel = weight->numel();
  threads = useful_threads(*weight, threads);
  const Output output{out, static_cast<Dtype>(out_dtype)};
  if (rank == 0) {
    parallel_for(ceil_div(numel, kFlatJob), threads, [&](int64_t index) {
      kernels->dequantize(*weight, output, index * kFlatJob, std::min(numel, (index + 1) * kFlatJob));
    });
    return FASTLORA_OK;
  }
  const Buffer panels = aligned_buffer(ceil_div(weight->cols, kPanel) * kPanel * rank);
  if (!panels) return FASTLORA_NO_MEMORY;
  pack_panels(lora_a, rank, weight->cols, threads, panels.get());
  const Adapter adapter{panels.get(), lora_b, rank, scaling};
  parallel_for(ceil_div(weight->rows, kMergeRows), threads, [&](int64_t index) {
    const int64_t begin = index * kMergeRows;
    kernels->merge(*weight, adapter, output, begin, std::min(weight->rows, begin + kMergeRows));
  });
  return FASTLORA_OK;
}

int fastlora_nf4_gemv(const Nf4Weight* weight, const void* x, int x_dtype, int64_t tokens, void* out, int out_dtype,
                      int isa, int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  return run_product(*weight, x, static_cast<Dtype>(x_dtype), tokens, weight->cols, weight->rows, kGemvRows,
                     Output{out, static_cast<Dtype>(out_dtype)}, *kernels, kernels->gemv, threads);
}

int fastlora_nf4_gemv_t(const Nf4Weight* weight, const void* x, int x_dtype, int64_t tokens, void* out, int out_dtype,
                        int isa, int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  return run_product(*weight, x, static_cast<Dtype>(x_dtype), tokens, weight->rows, weight->cols, kColumnTile,
                     Output{out, static_cast<Dtype>(out_dtype)}, *kernels, kernels->gemv_t, threads);
}

int fastlora_nf4_quantize(const void* w, int dtype, int64_t numel, int64_t log2_blocksize, uint8_t* codes,
                          float* absmax, int isa, int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  const Quantize quantize{w, static_cast<Dtype>(dtype), numel, log2_blocksize, codes, absmax};
  const int64_t blocks = ceil_div(numel, int64_t{1} << log2_blocksize), step = kFlatJob >> log2_blocksize;
  parallel_for(ceil_div(blocks, step), static_cast<int>(std::min<int64_t>(threads, 1 + (numel >> 16))),
               [&](int64_t index) { kernels->quantize(quantize, index * step, std::min(blocks, (index + 1) * step)); });
  return FASTLORA_OK;
}

int fastlora_nf4_quantize_scales(const float* absmax, int64_t blocks, float offset, const uint8_t* table,
                                 uint8_t* levels, float* absmax2, int threads) {
  const int64_t groups = ceil_div(blocks, kBlocksPerScale2);
  parallel_for(groups, static_cast<int>(std::min<int64_t>(threads, 1 + (blocks >> 14))), [&](int64_t group) {
    const int64_t begin = group * kBlocksPerScale2, end = std::min(blocks, begin + kBlocksPerScale2);
    float largest = 0.0f;
    for (int64_t b = begin; b < end; ++b) largest = std::max(largest, std::fabs(absmax[b] - offset));
    absmax2[group] = largest;
    const float inverse = 1.0f / std::max(largest, 1e-38f);
    for (int64_t b = begin; b < end; ++b) {
      // In this order of arguments NaN becomes a number, so that no scale whatever leads outside the table.
      const float scaled = std::max(-1.0f, std::min(1.0f, (absmax[b] - offset) * inverse));
      const int step = static_cast<int>((scaled + 1.0f) * 32767.5f + 0.5f);
      levels[b] = largest == 0.0f ? 0 : table[step];
    }
  });
  return FASTLORA_OK;
}

int fastlora_lora_shrink(const Activations* x, const Dropout* dropout, const float* a, int64_t rank,
                         int64_t a_row_stride, int64_t a_col_stride, float scaling, float* out, int isa, int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  if (x->rows == 0 || rank == 0) return FASTLORA_OK;
  threads = threads_for_lora(*x, rank, threads);
  Shrink shrink{*x, dropout, a, a_row_stride, rank, scaling, out};
  Buffer packed;
  if (a_col_stride != 1 || x->cols % kWidest != 0) {
    shrink.stride = round_up(x->cols, kWidest);
    packed = aligned_buffer(rank * shrink.stride);
    if (!packed) return FASTLORA_NO_MEMORY;
    pack_rows(a, rank, x->cols, a_row_stride, a_col_stride, shrink.stride, threads, packed.get());
    shrink.a = packed.get();
  }
  // Several jobs for each thread; too few rows for that are cut along the rank too.
  const int64_t row_step = std::clamp<int64_t>(round_up(ceil_div(x->rows, 4 * threads), 4), 4, kShrinkRows);
  const int64_t across = std::max<int64_t>(1, threads / ceil_div(x->rows, row_step));
  for_tiles(x->rows, row_step, rank, round_up(ceil_div(rank, across), 4), threads,
            [&](const Tile& tile) { kernels->lora_shrink(shrink, tile); });
  return FASTLORA_OK;
}

int fastlora_lora_outer(const Activations* x, const Dropout* dropout, const float* g, int64_t rank, float scaling,
                        float* out, int64_t out_row_stride, int64_t out_col_stride, int isa, int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  if (rank == 0) return FASTLORA_OK;
  const Outer outer{*x, dropout, g, rank, scaling, out, out_row_stride, out_col_stride};
  threads = threads_for_lora(*x, rank, threads);
  const int64_t rank_step = round_up(ceil_div(rank, ceil_div(rank, kOuterRanks)), 4);
  const int64_t wide_tiles = ceil_div(rank, rank_step) * ceil_div(x->cols, kOuterColumns);
  const int64_t col_step = wide_tiles < 2 * threads ? kOuterColumns / 2 : kOuterColumns;
  for_tiles(rank, rank_step, x->cols, col_step, threads, [&](const Tile& tile) { kernels->lora_outer(outer, tile); });
  return FASTLORA_OK;
}

int fastlora_dropout_mask(const Dropout* dropout, int64_t rows, int64_t cols, void* out, int out_dtype, int isa,
                          int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) return FASTLORA_NO_ISA;
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + (rows * cols >> 16)));
  if (cols % kDropoutGroup == 0) {  // the groups of one row follow on from those of the row above
    cols *= rows;
    rows = 1;
  }
  const int64_t groups = ceil_div(cols, kDropoutGroup);
  const Dtype dtype = static_cast<Dtype>(out_dtype);
  // A row is a whole number of jobs; short rows go several to a job.
  const int64_t row_step = std::max<int64_t>(1, kMaskJob / std::max<int64_t>(1, cols));
  for_tiles(rows, row_step, cols, kMaskJob, threads, [&](const Tile& tile) {
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
      const Output to{static_cast<char*>(out) + row * cols * element_size(dtype), dtype};
      kernels->dropout_mask(*dropout, to, static_cast<uint32_t>(row * groups), tile.col_begin, tile.col_end);
    }
  });
  return FASTLORA_OK;
}

int fastlora_linear(const LoraLinear* linear, const void* x, int64_t tokens, int64_t x_stride, const float* bias,
                    void* y, float* h, int isa, int threads) {
  if (isa != 3 || isa > best_isa()) return FASTLORA_NO_ISA;
  const Activations rows{x, tokens, linear->k(), x_stride, static_cast<int32_t>(Dtype::kBf16)};
  return linear_forward(*linear, rows, bias, y, h, threads) ? FASTLORA_OK : FASTLORA_NO_MEMORY;
}

int fastlora_linear_backward(const LoraLinear* linear, const void* dy, int64_t tokens, int64_t dy_stride, const void* x,
                             int64_t x_stride, const float* h, void* dx, void* da, void* db, int isa, int threads) {
  if (isa != 3 || isa > best_isa()) return FASTLORA_NO_ISA;
  const int32_t dtype = static_cast<int32_t>(Dtype::kBf16);
  const Activations gradients{dy, tokens, linear->n(), dy_stride, dtype}, rows{x, tokens, linear->k(), x_stride, dtype};
  return linear_backward(*linear, gradients, rows, h, dx, da, db, threads) ? FASTLORA_OK : FASTLORA_NO_MEMORY;
}

int fastlora_linear_is_for_few_tokens() { return has_amx() ? 1 : 0; }
