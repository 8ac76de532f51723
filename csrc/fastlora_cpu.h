// The C interface of libfastlora_cpu: raw pointers and sizes, so that one build serves every torch and Python.
//
// Every call can be made from several threads at once. `isa` is 0 portable, 1 AVX2 + FMA + F16C, 2 AVX-512 F + BW + VL,
// 3 the same with AVX512_BF16, and at most fastlora_best_isa(). A dtype is 0 fp32, 1 bf16, 2 fp16. The caller must have
// checked shapes and pointers.
#pragma once

#include <cstdint>

#include "linear.h"
#include "lora.h"
#include "nf4.h"

// Raised with every change of a signature, of a structure or of a meaning; fastlora/native/build.py holds the same number.
#define FASTLORA_ABI_VERSION 5

#define FASTLORA_EXPORT extern "C" __attribute__((visibility("default")))

enum FastloraStatus : int { FASTLORA_OK = 0, FASTLORA_NO_MEMORY = 1, FASTLORA_NO_ISA = 2 };

FASTLORA_EXPORT int fastlora_abi_version();
FASTLORA_EXPORT int fastlora_best_isa();
FASTLORA_EXPORT const char* fastlora_threading();

// out [N, K] = W, or W + scaling * (lora_b lora_a) with lora_a [rank, K] and lora_b [N, rank] fp32; rank 0 for none.
FASTLORA_EXPORT int fastlora_nf4_dequantize(const fastlora::Nf4Weight* weight, const float* lora_a, const float* lora_b,
                                            int64_t rank, float scaling, void* out, int out_dtype, int isa,
                                            int threads);

// out [tokens, N] = x [tokens, K] Wᵀ.
FASTLORA_EXPORT int fastlora_nf4_gemv(const fastlora::Nf4Weight* weight, const void* x, int x_dtype, int64_t tokens,
                                      void* out, int out_dtype, int isa, int threads);

// out [tokens, K] = x [tokens, N] W.
FASTLORA_EXPORT int fastlora_nf4_gemv_t(const fastlora::Nf4Weight* weight, const void* x, int x_dtype, int64_t tokens,
                                        void* out, int out_dtype, int isa, int threads);

// codes [(numel + 1) / 2] and absmax [blocks] fp32 of a flat weight.
FASTLORA_EXPORT int fastlora_nf4_quantize(const void* w, int dtype, int64_t numel, int64_t log2_blocksize,
                                          uint8_t* codes, float* absmax, int isa, int threads);

// levels [blocks] and absmax2 [(blocks + 255) / 256] fp32 of scales minus `offset`. The nearest of 256 levels is looked
// up in `table`, which has 65,536 steps over [-1, 1].
FASTLORA_EXPORT int fastlora_nf4_quantize_scales(const float* absmax, int64_t blocks, float offset,
                                                 const uint8_t* table, uint8_t* levels, float* absmax2, int threads);

// out [M, rank] fp32 = scaling * (mask of dropout, unless null, times x [M, K]) Aᵀ. `a` [rank, K] has any strides.
FASTLORA_EXPORT int fastlora_lora_shrink(const fastlora::Activations* x, const fastlora::Dropout* dropout,
                                         const float* a, int64_t rank, int64_t a_row_stride, int64_t a_col_stride,
                                         float scaling, float* out, int isa, int threads);

// out [rank, K] fp32 = scaling * gᵀ (mask of dropout, unless null, times x [M, K]). `out` has any strides; g is
// [M, rank].
FASTLORA_EXPORT int fastlora_lora_outer(const fastlora::Activations* x, const fastlora::Dropout* dropout,
                                        const float* g, int64_t rank, float scaling, float* out, int64_t out_row_stride,
                                        int64_t out_col_stride, int isa, int threads);

// out [rows, cols] = the mask of dropout.
FASTLORA_EXPORT int fastlora_dropout_mask(const fastlora::Dropout* dropout, int64_t rows, int64_t cols, void* out,
                                          int out_dtype, int isa, int threads);

// The linear of csrc/linear.h for any number of tokens; FASTLORA_NO_ISA below isa 3.
// y [M, N]; x [M, K], rows `x_stride` elements apart; bias [N] fp32 or null; h [M, rank] fp32 or null.
FASTLORA_EXPORT int fastlora_linear(const fastlora::LoraLinear* linear, const void* x, int64_t tokens, int64_t x_stride,
                                    const float* bias, void* y, float* h, int isa, int threads);

// dx [M, K], da [rank, K], db [N, rank], each or null; x where da is wanted, h where db is.
FASTLORA_EXPORT int fastlora_linear_backward(const fastlora::LoraLinear* linear, const void* dy, int64_t tokens,
                                             int64_t dy_stride, const void* x, int64_t x_stride, const float* h,
                                             void* dx, void* da, void* db, int isa, int threads);

// 1 where torch's products (AMX) are much faster than fastlora_linear's except for few tokens, else 0.
FASTLORA_EXPORT int fastlora_linear_is_for_few_tokens();
