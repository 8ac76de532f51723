// A LoRA linear in one call, forward and backward, only for CPUs with AVX512_BF16.
#pragma once

#include "../linear.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define FASTLORA_HAS_BF16 1
#else
#define FASTLORA_HAS_BF16 0
#endif

namespace fastlora {

// Whether this machine has the instructions and this build knows them.
bool has_bf16_products();
// Whether the machine has AMX, which torch uses and whose products are several times as fast.
bool has_amx();

// y [M, N], and h [M, rank] fp32 unless null. False if memory is short.
bool linear_forward(const LoraLinear& linear, const Activations& x, const float* bias, void* y, float* h, int threads);

// dx [M, K], da [rank, K] and db [N, rank], each unless null. x is read for da, h for db.
bool linear_backward(const LoraLinear& linear, const Activations& dy, const Activations& x, const float* h, void* dx,
                     void* da, void* db, int threads);

}  // namespace fastlora
