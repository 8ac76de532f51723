// One LoRA linear in bf16 as the one-call products of the CPU take it: a frozen base and its adapters.
//
//     y  = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias
//     dx = dy W + scaling · mask ∘ ((dy B) A),   dA = scaling · (dy B)ᵀ x̃,   dB = scaling · dyᵀ h,   h = x̃ Aᵀ
#pragma once

#include <cstdint>

#include "lora.h"
#include "nf4.h"

namespace fastlora {

// Everything is borrowed from the caller. x, dy, y, dx and a dense weight are bf16. N and K are even, so that a row is
// a whole number of pairs; over NF4, K is a multiple of 32.
struct LoraLinear {
  const void* weight;     // dense [N, K], or null for NF4
  int64_t weight_stride;  // from row to row, in elements
  Nf4Weight nf4;          // N and K always; codes and scales where `weight` is null
  const void* lora_a;     // [rank, K], contiguous
  const void* lora_b;     // [N, rank], contiguous
  int64_t rank;           // 0 for no adapters
  Dropout dropout;        // threshold below 0 for none
  float scaling;
  int32_t adapter_dtype;  // of A and B and of their gradients: 0 fp32, 1 bf16

  int64_t n() const { return nf4.rows; }
  int64_t k() const { return nf4.cols; }
  bool drops() const { return rank != 0 && dropout.threshold >= 0; }
  float kept() const { return drops() ? dropout.kept() : 1.0f; }
};

}  // namespace fastlora
