// The host's half of what the kernels need from a GPU: facts about a device, and launches. On the CPU, emulate.h.
#pragma once

#include "device.h"

namespace fastlora {
namespace gpu {

using Kernel = void (*)(Problem);

// One decode kernel for each count of tokens, a plain one and one for blocks of 32, and the second kernel.
struct Kernels {
  Kernel products[3][2];
  Kernel epilogue[3];
};
extern const Kernels kBf16Kernels;
extern const Kernels kHalfKernels;

constexpr int kMaxDevices = 64;

#ifdef __CUDACC__
// The library has its own CUDA run time: if no context were current yet, it would take the first device.
inline int use_device(int device) {
  return device < 0 || device >= kMaxDevices ? cudaErrorInvalidDevice : cudaSetDevice(device);
}

inline int multiprocessors(int device, int& count) {
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Gives a kernel its shared memory on the current device, and returns how many of its blocks a multiprocessor takes.
inline int prepare(Kernel kernel, int threads, uint32_t shared, int& blocks_each) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, function, threads, shared);
  }
  cudaGetLastError();  // a failure that is reported here must not surface again in another check
  return error != cudaSuccess ? error : blocks_each > 0 ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

// Whether a kernel may start before the one ahead of it in the stream has ended.
inline bool can_overlap(int device) {
  int major = 0, driver = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDriverGetVersion(&driver);
  return major >= 9 && driver >= 12030;
}

inline int launch(Kernel kernel, int blocks, int threads, uint32_t shared, bool overlaps, void* stream,
                  const Problem& problem) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  Problem copy = problem;
  void* arguments[] = {&copy};
  const int error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

}  // namespace gpu
}  // namespace fastlora
