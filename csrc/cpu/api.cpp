// The C entry points: choose the instruction set, prepare what the jobs share, hand the jobs out.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../fastlora_cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace fastlora {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kF16c = 1u << 29;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !(ecx & kF16c)) return 0;
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

const Kernels* kernels_for(int isa) {
  static const int best = best_isa();
  if (isa < 0 || isa > best) return nullptr;
#if defined(__x86_64__)
  if (isa == 2) return &kAvx512Kernels;
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
