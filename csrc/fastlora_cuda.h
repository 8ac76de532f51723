// The C interface of libfastlora_cuda: raw device pointers, sizes and a stream, so that one build serves every torch.
//
// A call makes its device the thread's current one, works on the given stream, allocates nothing and waits for nothing,
// so it can be captured in a CUDA graph. It queries a device only once, at the first call there. Results: 0, a negative
// number for arguments that the kernels cannot take, or a cudaError_t; fastlora_cuda_message() puts them in words. A
// dtype is 0 fp32, 1 bf16, 2 fp16.
#pragma once

#include <cstdint>

#include "nf4.h"

// Raised with every change of a signature, of a structure or of a meaning; fastlora/native/build.py holds the same number.
#define FASTLORA_CUDA_ABI_VERSION 1

#ifndef FASTLORA_EXPORT
#define FASTLORA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum FastloraCudaStatus : int {
  FASTLORA_CUDA_OK = 0,
  FASTLORA_CUDA_BAD_SHAPE = -1,
  FASTLORA_CUDA_BAD_DTYPE = -2,
  FASTLORA_CUDA_MISALIGNED = -3
};

namespace fastlora {

// out [tokens, N] = x [tokens, K] Wᵀ + scaling * (x lora_aᵀ) lora_bᵀ + bias. 1 to 16 tokens; K a multiple of 64 and of
// the blocksize; rank 0 for no adapters; codes, x, lora_a, lora_b and workspace at multiples of 16 bytes.
struct CudaDecode {
  Nf4Weight weight;
  const void* x;         // [tokens, K], bf16 or fp16
  int64_t x_row_stride;  // in elements, a multiple of 8
  int64_t tokens;
  const void* lora_a;  // [rank, K], fp32 or of x's dtype
  const void* lora_b;  // [N, rank], of lora_a's dtype
  int64_t rank;
  const void* bias;  // [N], fp32 or of x's dtype; null for none
  void* out;         // [tokens, N], of x's dtype
  void* workspace;   // of the size that fastlora_cuda_decode_workspace() returns for this device
  float scaling;
  int32_t x_dtype;
  int32_t adapter_dtype;
  int32_t bias_dtype;
  int32_t device;
};

}  // namespace fastlora

FASTLORA_EXPORT int fastlora_cuda_abi_version();
// What the library was compiled for, as "80_86_90".
FASTLORA_EXPORT const char* fastlora_cuda_architectures();
// 0 where the kernels can run on a device.
FASTLORA_EXPORT int fastlora_cuda_probe(int device);
// Bytes of shared memory that a block of the first decode kernel takes; with 0 tokens, one of the second.
FASTLORA_EXPORT int64_t fastlora_cuda_decode_shared(int64_t tokens);
// Bytes, or if negative a result as above; a cudaError_t e is returned as -1000 - e.
FASTLORA_EXPORT int64_t fastlora_cuda_decode_workspace(int64_t tokens, int64_t rows, int64_t cols,
                                                       int64_t log2_blocksize, int64_t rank, int x_dtype, int device);
FASTLORA_EXPORT int fastlora_cuda_decode(const fastlora::CudaDecode* arguments, void* stream);
FASTLORA_EXPORT const char* fastlora_cuda_message(int status);
