// A GPU on the CPU, for tests: what device.h and launch.h need from one, by the rules of the PTX manual.
//
// A kernel's blocks run one after another. Every thread of a block is a context of its own, which runs until a warp or
// the block has to synchronize. Which context continues is drawn at random, so code that lacks a barrier gives wrong
// sums in some draw. Asynchronous copies arrive at once or only when waited for, also at random. Fresh shared memory is
// NaN. An access outside shared memory or outside the memory that the test has named, a misaligned one, a write to
// read-only memory, lanes that do not come together: each ends the launch with a message.
//
// Source: PTX ISA 8.5, sections 9.7.14.5.7 and 9.7.14.5.8 (layout of the fragments), 9.7.9.25 (cp.async).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/convert.h"
#include "layout.h"

#define FASTLORA_DEVICE inline
#define FASTLORA_KERNEL(threads, blocks) void

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace fastlora {
namespace gpu {
namespace emulated {

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  uint32_t offset;
  const uint8_t* source;
  int commit;
};

// What a lane contributes when its warp comes together.
struct Exchange {
  int kind;
  uint32_t words[8];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  State state = State::kReady;
  int meetings = 0;
  int commits = 0;
  std::vector<Copy> copies;
};

struct Span {
  const uint8_t* begin;
  const uint8_t* end;
  bool writable;
};

class Machine {
 public:
  int multiprocessors = 4;
  int blocks_each = 2;
  uint64_t lot = 1;
  std::string error;
  std::vector<Span> memory;
  int block = 0;
  int thread = 0;
  int threads = 0;

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  uint64_t draw(uint64_t below) {
    lot = lot * 6364136223846793005u + 1442695040888963407u;
    return (lot >> 33) % below;
  }

  // Stops the running thread for good: the scheduler sees the error and abandons the launch.
  void fail(const std::string& what) {
    if (error.empty()) error = "block " + std::to_string(block) + ", thread " + std::to_string(thread) + ": " + what;
    swapcontext(&all_[thread].context, &scheduler_);
  }

  uint8_t* shared(uint32_t offset, size_t size) {
    if (offset % size != 0) fail("misaligned shared memory access at " + std::to_string(offset));
    if (offset + size > shared_.size()) fail("access beyond shared memory at " + std::to_string(offset));
    return shared_.data() + offset;
  }

  void check(const void* address, size_t size, bool write, bool constant) {
    const uint8_t* first = static_cast<const uint8_t*>(address);
    if (reinterpret_cast<uintptr_t>(address) % size != 0) fail("misaligned global memory access");
    for (auto span = memory.rbegin(); span != memory.rend(); ++span) {  // the last one named applies
      if (first < span->begin || first + size > span->end) continue;
      if (write && !span->writable) fail("write to memory that may only be read");
      if (constant && span->writable) fail("a constant load from memory that kernels write");
      return;
    }
    fail("access outside the memory that was named");
  }

  // Brings the lanes of a warp together and returns what each of them contributed.
  const Exchange* meet_warp(const Exchange& mine) {
    const int warp = thread / 32, turn = all_[thread].meetings++ % 2;
    exchanges_[warp][turn][thread % 32] = mine;
    wait(State::kAtWarp);
    return exchanges_[warp][turn];
  }

  void meet_block() { wait(State::kAtBlock); }

  void copy_async(uint32_t offset, const uint8_t* source) {
    check(source, 16, false, true);
    uint8_t* target = shared(offset, 16);
    if (draw(2) == 0) {
      std::memcpy(target, source, 16);
    } else {
      all_[thread].copies.push_back({offset, source, all_[thread].commits});
    }
  }

  void commit_copies() { ++all_[thread].commits; }

  void wait_copies(int pending) {
    Thread& me = all_[thread];
    std::vector<Copy> later;
    for (const Copy& copy : me.copies) {
      if (copy.commit >= me.commits - pending) {
        later.push_back(copy);
      } else {
        std::memcpy(shared(copy.offset, 16), copy.source, 16);
      }
    }
    me.copies = later;
  }

  // Runs a whole grid; false if it broke a rule, which `error` then describes.
  bool run(void (*kernel)(Problem), int blocks, int block_threads, uint32_t shared_bytes, const Problem& problem) {
    error.clear();
    threads = block_threads;
    kernel_ = kernel;
    problem_ = &problem;
    for (block = 0; block < blocks && error.empty(); ++block) {
      shared_.assign(shared_bytes, 0xff);
      run_block();
    }
    return error.empty();
  }

 private:
  static constexpr size_t kStackBytes = 1 << 16;

  static void enter() {
    Machine& machine = get();
    machine.kernel_(*machine.problem_);
    machine.wait(State::kDone);
  }

  void wait(State state) {
    all_[thread].state = state;
    swapcontext(&all_[thread].context, &scheduler_);
  }

  void run_block() {
    if (static_cast<int>(all_.size()) < threads) all_.resize(threads);
    for (int i = 0; i < threads; ++i) {
      Thread& one = all_[i];
      if (!one.stack) one.stack = std::make_unique<uint8_t[]>(kStackBytes);
      one.state = State::kReady;
      one.meetings = one.commits = 0;
      one.copies.clear();
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.get();
      one.context.uc_stack.ss_size = kStackBytes;
      one.context.uc_link = nullptr;
      makecontext(&one.context, &Machine::enter, 0);
    }
    exchanges_.resize((threads + 31) / 32);
    int running = threads;
    std::vector<int> ready;
    for (int i = 0; i < threads; ++i) ready.push_back(i);
    while (running > 0 && error.empty()) {
      if (ready.empty()) {
        error = "block " + std::to_string(block) + ": its threads wait for one another for ever";
        return;
      }
      const size_t pick = draw(ready.size());
      thread = ready[pick];
      ready[pick] = ready.back();
      ready.pop_back();
      swapcontext(&scheduler_, &all_[thread].context);
      if (!error.empty()) return;
      if (all_[thread].state == State::kDone) --running;
      if (all_[thread].state == State::kAtWarp) release(thread / 32 * 32, 32, State::kAtWarp, ready);
      if (all_[thread].state == State::kAtBlock) release(0, threads, State::kAtBlock, ready);
    }
  }

  // Lets `count` threads from `first` continue if all of them have arrived.
  void release(int first, int count, State state, std::vector<int>& ready) {
    for (int i = first; i < first + count; ++i) {
      if (all_[i].state != state) return;
    }
    if (state == State::kAtWarp) {
      const Exchange* all = exchanges_[first / 32][(all_[first].meetings - 1) % 2];
      for (int i = 0; i < 32; ++i) {
        if (all[i].kind != all[0].kind || all_[first + i].meetings != all_[first].meetings) {
          error = "block " + std::to_string(block) + ": lanes of a warp have come to different instructions";
        }
      }
    }
    for (int i = first; i < first + count; ++i) {
      all_[i].state = State::kReady;
      ready.push_back(i);
    }
  }

  struct Warp {
    Exchange turns[2][32];
    Exchange* operator[](int turn) { return turns[turn]; }
  };

  std::vector<Thread> all_;
  std::vector<Warp> exchanges_;
  std::vector<uint8_t> shared_;
  ucontext_t scheduler_;
  void (*kernel_)(Problem) = nullptr;
  const Problem* problem_ = nullptr;
};

enum Kind { kSync, kShuffle, kShuffleXor, kMultiply, kMultiplyTf32 };

inline uint32_t shuffle_bits(uint32_t value, int lane, Kind kind) {
  return Machine::get().meet_warp({kind, {value}})[lane % 32].words[0];
}

inline float low_half(uint32_t word, Bf16) { return to_float(fastlora::Bf16{static_cast<uint16_t>(word)}); }
inline float low_half(uint32_t word, Half) { return to_float(fastlora::Half{static_cast<uint16_t>(word)}); }

template <class T>
void multiply_16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  Machine& machine = Machine::get();
  const Exchange* all = machine.meet_warp({kMultiply, {a[0], a[1], a[2], a[3], b0, b1}});
  const int lane = machine.thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, upper = k % 2 * 16;
      const uint32_t left = all[row % 8 * 4 + t].words[row / 8 + k / 8 * 2] >> upper;
      const uint32_t right = all[column * 4 + t].words[4 + k / 8] >> upper;
      acc[i] += low_half(left, type) * low_half(right, type);
    }
  }
}

}  // namespace emulated

inline int thread_index() { return emulated::Machine::get().thread; }
inline int thread_count() { return emulated::Machine::get().threads; }
inline int block_index() { return emulated::Machine::get().block; }

inline void sync_warp() { emulated::Machine::get().meet_warp({emulated::kSync, {}}); }
inline void sync_block() { emulated::Machine::get().meet_block(); }
inline uint32_t shuffle(uint32_t value, int lane) { return emulated::shuffle_bits(value, lane, emulated::kShuffle); }
inline float shuffle(float value, int lane) {
  return float_of(emulated::shuffle_bits(bits_of(value), lane, emulated::kShuffle));
}
inline float shuffle_xor(float value, int mask) {
  return float_of(emulated::shuffle_bits(bits_of(value), thread_index() % 32 ^ mask, emulated::kShuffleXor));
}
inline int same_in_warp(int value) { return static_cast<int>(shuffle(static_cast<uint32_t>(value), 0)); }
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}

template <class V>
V load_shared(uint32_t offset) {
  V value;
  std::memcpy(&value, emulated::Machine::get().shared(offset, sizeof value), sizeof value);
  return value;
}
template <class V>
void store_shared(uint32_t offset, V value) {
  std::memcpy(emulated::Machine::get().shared(offset, sizeof value), &value, sizeof value);
}
template <class V>
V load_constant(const V* address) {
  emulated::Machine::get().check(address, sizeof(V), false, true);
  return *address;
}
template <class V>
V load_global(const V* address) {
  emulated::Machine::get().check(address, sizeof(V), false, false);
  return *address;
}
template <class V>
void store_global(V* address, V value) {
  emulated::Machine::get().check(address, sizeof(V), true, false);
  *address = value;
}

inline void copy_async(uint32_t offset, const uint8_t* source) { emulated::Machine::get().copy_async(offset, source); }
inline void commit_copies() { emulated::Machine::get().commit_copies(); }
template <int pending>
void wait_copies() {
  emulated::Machine::get().wait_copies(pending);
}

inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  emulated::multiply_16(acc, a, b0, b1, Bf16{});
}
inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  emulated::multiply_16(acc, a, b0, b1, Half{});
}
inline void multiply_tf32(float (&acc)[4], const float (&a)[4], float b0, float b1) {
  emulated::Machine& machine = emulated::Machine::get();
  const emulated::Exchange* all =
      machine.meet_warp({emulated::kMultiplyTf32,
                         {bits_of(a[0]), bits_of(a[1]), bits_of(a[2]), bits_of(a[3]), bits_of(b0), bits_of(b1)}});
  const int lane = machine.thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 4].words[row / 8 + k / 4 * 2];
      const uint32_t right = all[column * 4 + k % 4].words[4 + k / 4];
      acc[i] += float_of(left & 0xffffe000u) * float_of(right & 0xffffe000u);
    }
  }
}

inline float float_from_bits(uint32_t bits) { return float_of(bits); }
inline uint32_t bits_from_float(float value) { return bits_of(value); }
inline uint16_t round_to(float value, Bf16) {
  fastlora::Bf16 out;
  from_float(value, &out);
  return out.bits;
}
inline uint16_t round_to(float value, Half) {
  fastlora::Half out;
  from_float(value, &out);
  return out.bits;
}
inline float widen(uint16_t bits, Bf16) { return to_float(fastlora::Bf16{bits}); }
inline float widen(uint16_t bits, Half) { return to_float(fastlora::Half{bits}); }

inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline int use_device(int device) { return device == 0 ? 0 : 1; }
inline int multiprocessors(int, int& count) {
  count = emulated::Machine::get().multiprocessors;
  return 0;
}
inline int prepare(void (*)(Problem), int, uint32_t, int& blocks_each) {
  blocks_each = emulated::Machine::get().blocks_each;
  return 0;
}
inline bool can_overlap(int) { return true; }
inline int launch(void (*kernel)(Problem), int blocks, int threads, uint32_t shared, bool, void*,
                  const Problem& problem) {
  return emulated::Machine::get().run(kernel, blocks, threads, shared, problem) ? 0 : 1;
}
inline const char* error_text(int) { return emulated::Machine::get().error.c_str(); }

}  // namespace gpu
}  // namespace fastlora
