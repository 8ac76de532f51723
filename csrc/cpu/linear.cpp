// What the one-call products need besides: whether this machine can run them, and memory kept from call to call.
#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "bf16_operands.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastlora {

bool has_amx() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxBf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16);
#else
  return false;
#endif
}

#if FASTLORA_HAS_BF16

bool has_bf16_products() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
};

}  // namespace

char* kept_room(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> room;
  thread_local int64_t size = 0;
  if (bytes > size || !room) {
    room.reset();
    size = std::max<int64_t>(bytes, 1 << 16);
    void* p = nullptr;
    if (posix_memalign(&p, 64, size) != 0) {
      size = 0;
      return nullptr;
    }
    room.reset(static_cast<char*>(p));
  }
  return room.get();
}

char* job_room() {
  alignas(64) thread_local char room[kJobRoom];
  return room;
}

#else

bool has_bf16_products() { return false; }

bool linear_forward(const LoraLinear&, const Activations&, const float*, void*, float*, int) { return false; }

bool linear_backward(const LoraLinear&, const Activations&, const Activations&, const float*, void*, void*, void*,
                     int) {
  return false;
}

#endif

}  // namespace fastlora
