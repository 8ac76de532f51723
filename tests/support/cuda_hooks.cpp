// What tests ask of the emulated GPU (csrc/cuda/emulate.h) and of the kernels' layout, over a plain C interface.
#include "cuda/device.h"
#include "fastlora_cuda.h"

using namespace fastlora::gpu;

#define HOOK extern "C" __attribute__((visibility("default")))

HOOK void emulate(uint64_t lot, int multiprocessors, int blocks_each) {
  emulated::Machine& machine = emulated::Machine::get();
  machine.lot = lot;
  machine.multiprocessors = multiprocessors;
  machine.blocks_each = blocks_each;
  machine.memory.clear();
}

HOOK void emulate_memory(const void* begin, int64_t bytes, int writable) {
  const uint8_t* first = static_cast<const uint8_t*>(begin);
  emulated::Machine::get().memory.push_back({first, first + bytes, writable != 0});
}

HOOK void plan(int tokens, int rows, int cols, int rank, int multiprocessors, int blocks_each, int* out) {
  const Plan plan = make_plan({tokens, rows, cols, rank}, multiprocessors, blocks_each);
  out[0] = plan.ranges;
  out[1] = plan.groups;
  out[2] = plan.warps;
  out[3] = plan.lora_parts;
}

HOOK void part(int count, int parts, int i, int* out) {
  const Part part = part_of(count, parts, i);
  out[0] = part.begin;
  out[1] = part.end;
}

HOOK int first_column_of(int is_short, int t, int h) {
  return is_short ? first_column<true>(t, h) : first_column<false>(t, h);
}
HOOK uint32_t table_offset_of(int byte, int lane) { return table_offset(byte, lane); }
HOOK uint32_t slot_offset_of(int stage, int warp) { return slot_offset(stage, warp); }
HOOK uint32_t code_offset_of(int row, int byte) { return code_offset(row, byte); }
HOOK uint32_t sum_offset_of(int row, int token) { return sum_offset(row, token); }
HOOK uint32_t shared_bytes_of(int tokens) { return shared_bytes(tokens); }
HOOK int sizeof_arguments() { return sizeof(fastlora::CudaDecode); }

// Level i as the products see it.
HOOK double rounded_level(int half, int i) {
  const float level = fastlora::nf4_code().value[i];
  if (half) return widen(round_to(level * level_factor<Half>(), Half{}), Half{}) / double{level_factor<Half>()};
  return widen(round_to(level * level_factor<Bf16>(), Bf16{}), Bf16{}) / double{level_factor<Bf16>()};
}
