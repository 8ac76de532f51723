// The C entry points: refuse what the kernels cannot take, plan, launch the two kernels.
#include <atomic>

#include "../fastlora_cuda.h"
#include "decode.h"
#include "epilogue.h"
#include "launch.h"

#ifndef FASTLORA_ARCHITECTURES
#define FASTLORA_ARCHITECTURES
#endif
#define FASTLORA_TEXT(name) #name
#define FASTLORA_TEXT_OF(name) FASTLORA_TEXT(name)

namespace fastlora {
namespace gpu {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 26;  // of the weight: an index into 16 rows of it stays below 2^31
constexpr int64_t kMaxRank = int64_t{1} << 16;
constexpr int64_t kMaxLog2Blocksize = 12;
constexpr int kTokens[3] = {2, 8, 16};

// Which of the compiled kernels a product takes.
struct Choice {
  const Kernels* kernels;
  int size;  // index into kTokens
  bool is_short;

  Kernel products() const { return kernels->products[size][is_short]; }
  Kernel epilogue() const { return kernels->epilogue[size]; }
};

struct Device {
  int multiprocessors;
  int blocks_each;
  bool overlaps;
};

// Bit 31 is set once the rest is known: multiprocessors in 16 bits, then blocks for each, then whether kernels overlap.
std::atomic<uint32_t> known_devices[kMaxDevices][2][3][2];

int find_device(const Choice& choice, int index, Device& device) {
  if (const int error = use_device(index)) return error;
  const bool half = choice.kernels == &kHalfKernels;
  std::atomic<uint32_t>& known = known_devices[index][half][choice.size][choice.is_short];
  uint32_t facts = known.load(std::memory_order_relaxed);
  if (facts == 0) {
    int count = 0, each = 0;
    if (const int error = multiprocessors(index, count)) return error;
    const uint32_t shared = shared_bytes(kTokens[choice.size]);
    if (const int error = prepare(choice.products(), kMaxThreads, shared, each)) return error;
    if (const int error = prepare(choice.epilogue(), kEpilogueThreads, epilogue_shared_bytes(), device.blocks_each)) {
      return error;
    }
    facts = 1u << 31 | uint32_t{can_overlap(index)} << 24 | static_cast<uint32_t>(each) << 16 | count;
    known.store(facts, std::memory_order_relaxed);
  }
  device.multiprocessors = facts & 0xffff;
  device.blocks_each = facts >> 16 & 0xff;
  device.overlaps = facts >> 24 & 1;
  return FASTLORA_CUDA_OK;
}

int choose(int64_t tokens, const Nf4Weight& weight, int64_t rank, int x_dtype, Choice& choice, Shape& shape) {
  if (tokens < 1 || tokens > kMaxTokens || rank < 0 || rank > kMaxRank) return FASTLORA_CUDA_BAD_SHAPE;
  if (weight.log2_blocksize < 5 || weight.log2_blocksize > kMaxLog2Blocksize) return FASTLORA_CUDA_BAD_SHAPE;
  const int64_t blocksize = int64_t{1} << weight.log2_blocksize;
  if (weight.rows < 1 || weight.cols < 1 || weight.rows > kMaxSide || weight.cols > kMaxSide ||
      weight.cols % kBlock != 0 || weight.cols % blocksize != 0 || weight.numel() / blocksize > INT32_MAX) {
    return FASTLORA_CUDA_BAD_SHAPE;
  }
  if (x_dtype != 1 && x_dtype != 2) return FASTLORA_CUDA_BAD_DTYPE;
  choice.kernels = x_dtype == 1 ? &kBf16Kernels : &kHalfKernels;
  choice.size = tokens <= 2 ? 0 : tokens <= 8 ? 1 : 2;
  choice.is_short = blocksize < kBlock;
  shape = {static_cast<int>(tokens), static_cast<int>(weight.rows), static_cast<int>(weight.cols),
           static_cast<int>(rank)};
  return FASTLORA_CUDA_OK;
}

bool misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

int decode(const CudaDecode& given, void* stream) {
  Choice choice;
  Problem problem = {};
  if (const int status = choose(given.tokens, given.weight, given.rank, given.x_dtype, choice, problem.shape)) {
    return status;
  }
  if (given.adapter_dtype != 0 && given.adapter_dtype != given.x_dtype) return FASTLORA_CUDA_BAD_DTYPE;
  if (given.bias_dtype != 0 && given.bias_dtype != given.x_dtype) return FASTLORA_CUDA_BAD_DTYPE;
  if (misaligned(given.weight.codes) || misaligned(given.x) || misaligned(given.lora_a) || misaligned(given.lora_b) ||
      misaligned(given.workspace) || given.x_row_stride % 8 != 0) {
    return FASTLORA_CUDA_MISALIGNED;
  }
  Device device;
  if (const int error = find_device(choice, given.device, device)) return error;
  problem.plan = make_plan(problem.shape, device.multiprocessors, device.blocks_each);
  problem.weight = given.weight;
  problem.nested = given.weight.absmax2 != nullptr;
  problem.log2_blocksize = static_cast<int>(given.weight.log2_blocksize);
  problem.x = static_cast<const uint16_t*>(given.x);
  problem.x_stride = given.x_row_stride;
  problem.lora_a = given.lora_a;
  problem.lora_b = given.lora_b;
  problem.adapters_fp32 = given.adapter_dtype == 0;
  problem.scaling = given.scaling;
  problem.bias = given.bias;
  problem.bias_fp32 = given.bias_dtype == 0;
  problem.out = static_cast<uint16_t*>(given.out);
  problem.base = static_cast<float*>(given.workspace);
  problem.h = problem.base + problem.shape.base_floats(problem.plan);
  const uint32_t shared = shared_bytes(kTokens[choice.size]);
  if (const int error =
          launch(choice.products(), problem.plan.blocks(), 32 * problem.plan.warps, shared, false, stream, problem)) {
    return error;
  }
  return launch(choice.epilogue(), ceil_div(problem.shape.rows, kEpilogueRows), kEpilogueThreads,
                epilogue_shared_bytes(), device.overlaps, stream, problem);
}

}  // namespace
}  // namespace gpu
}  // namespace fastlora

using namespace fastlora;

FASTLORA_EXPORT int fastlora_cuda_abi_version() { return FASTLORA_CUDA_ABI_VERSION; }

FASTLORA_EXPORT const char* fastlora_cuda_architectures() { return FASTLORA_TEXT_OF(FASTLORA_ARCHITECTURES); }

FASTLORA_EXPORT int fastlora_cuda_probe(int device) {
  gpu::Device facts;
  return gpu::find_device({&gpu::kBf16Kernels, 0, false}, device, facts);
}

FASTLORA_EXPORT int64_t fastlora_cuda_decode_shared(int64_t tokens) {
  return tokens == 0 ? gpu::epilogue_shared_bytes() : gpu::shared_bytes(static_cast<int>(tokens));
}

FASTLORA_EXPORT int64_t fastlora_cuda_decode_workspace(int64_t tokens, int64_t rows, int64_t cols,
                                                       int64_t log2_blocksize, int64_t rank, int x_dtype, int device) {
  Nf4Weight weight = {};
  weight.rows = rows;
  weight.cols = cols;
  weight.log2_blocksize = log2_blocksize;
  gpu::Choice choice;
  gpu::Shape shape;
  if (const int status = gpu::choose(tokens, weight, rank, x_dtype, choice, shape)) return status;
  gpu::Device facts;
  if (const int error = gpu::find_device(choice, device, facts)) return -1000 - error;
  const gpu::Plan plan = gpu::make_plan(shape, facts.multiprocessors, facts.blocks_each);
  return (shape.base_floats(plan) + shape.h_floats(plan)) * static_cast<int64_t>(sizeof(float));
}

FASTLORA_EXPORT int fastlora_cuda_decode(const CudaDecode* arguments, void* stream) {
  return gpu::decode(*arguments, stream);
}

FASTLORA_EXPORT const char* fastlora_cuda_message(int status) {
  switch (status) {
    case FASTLORA_CUDA_BAD_SHAPE:
      return "the kernels take 1 to 16 tokens and a weight whose columns are a multiple of 64 and of the blocksize";
    case FASTLORA_CUDA_BAD_DTYPE:
      return "the kernels take bf16 or fp16 activations, and adapters and bias of fp32 or of the activations' dtype";
    case FASTLORA_CUDA_MISALIGNED:
      return "the kernels take pointers at multiples of 16 bytes, and rows of x that begin at such";
    default:
      return gpu::error_text(status);
  }
}
