// What the kernels need from a GPU, in one place: device instructions here, the same names on the CPU in emulate.h, so
// that the same code that runs on a GPU is tested without one. Shared memory is addressed in bytes from its beginning.
#pragma once

#include <cstdint>

#include "layout.h"

#ifndef __CUDACC__
#include "emulate.h"
#else
#define FASTLORA_DEVICE __device__ __forceinline__
#define FASTLORA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fastlora {
namespace gpu {

extern __shared__ __align__(256) uint8_t shared_memory[];

FASTLORA_DEVICE int thread_index() { return threadIdx.x; }
FASTLORA_DEVICE int thread_count() { return blockDim.x; }
FASTLORA_DEVICE int block_index() { return blockIdx.x; }

FASTLORA_DEVICE void sync_warp() { __syncwarp(); }
FASTLORA_DEVICE void sync_block() { __syncthreads(); }
// A value that is the same in all lanes of a warp, in a form that tells the compiler so.
FASTLORA_DEVICE int same_in_warp(int value) { return __shfl_sync(0xffffffffu, value, 0); }
FASTLORA_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
FASTLORA_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
FASTLORA_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
FASTLORA_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

template <class V>
FASTLORA_DEVICE V load_shared(uint32_t offset) {
  return *reinterpret_cast<const V*>(shared_memory + offset);
}
template <class V>
FASTLORA_DEVICE void store_shared(uint32_t offset, V value) {
  *reinterpret_cast<V*>(shared_memory + offset) = value;
}
// Memory that no kernel of this library writes.
template <class V>
FASTLORA_DEVICE V load_constant(const V* address) {
  return __ldg(address);
}
template <class V>
FASTLORA_DEVICE V load_global(const V* address) {
  return *address;
}
template <class V>
FASTLORA_DEVICE void store_global(V* address, V value) {
  *address = value;
}

// Sixteen bytes from global to shared memory, past the registers; they are there once wait_copies says so.
FASTLORA_DEVICE void copy_async(uint32_t offset, const uint8_t* source) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
FASTLORA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, except those of the last `pending` commits.
template <int pending>
FASTLORA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// acc [16, 8] += a [16, 16] b [16, 8] over a warp. With g = lane / 4 and t = lane % 4 a lane holds
// a: rows g, g + 8, g, g + 8, columns 2t and 2t + 1, from 8 on in the last two; b: the same columns as rows, column g;
// acc: row g, columns 2t and 2t + 1, then row g + 8.
FASTLORA_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTLORA_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// acc [16, 8] += a [16, 8] b [8, 8] in tf32: of each fp32 the upper 19 bits. a: rows g, g + 8, g, g + 8, column t, then
// t + 4; b: the same columns as rows, column g.
FASTLORA_DEVICE void multiply_tf32(float (&acc)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

FASTLORA_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
FASTLORA_DEVICE uint32_t bits_from_float(float value) { return __float_as_uint(value); }
FASTLORA_DEVICE uint16_t round_to(float value, Bf16) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FASTLORA_DEVICE uint16_t round_to(float value, Half) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FASTLORA_DEVICE float widen(uint16_t bits, Bf16) { return __uint_as_float(uint32_t{bits} << 16); }
FASTLORA_DEVICE float widen(uint16_t bits, Half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Programmatic dependent launch: the next kernel may start once every block has allowed it, and before it reads what
// this one wrote it waits until all of it is there. Before sm_90 kernels follow one another anyway.
FASTLORA_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FASTLORA_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace gpu
}  // namespace fastlora
#endif
