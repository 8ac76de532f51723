// The fused products over one LoRA linear, for CPUs with AVX512_BF16 alone.
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
// Whether the machine has AMX, whose products torch uses and which are several times as fast.
bool has_amx();

// y [M, N], and h [M, rank] fp32 where not null. False for want of memory.
bool linear_forward(const LoraLinear& linear, const Activations& x, const float* bias, void* y, float* h, int threads);

// dx [M, K], da [rank, K] and db [N, rank], each where not null. x is read for da, h for db.
bool linear_backward(const LoraLinear& linear, const Activations& dy, const Activations& x, const float* h, void* dx,
                     void* da, void* db, int threads);

}  // namespace fastlora
