// Random calls of every C entry, for a build with AddressSanitizer and UndefinedBehaviorSanitizer: `fuzz SEED CASES`.
//
// A case draws everything from its number, which is printed before it, so `fuzz NUMBER 1` repeats it. Sizes are at the
// edges of blocks, vectors and jobs; numbers are tame, or mixed with infinities, NaN, denormals and the largest, or any
// bits at all. Each operand is an allocation of its own that ends where the operand ends. Each call is made twice, with
// other threads and other memory in its results: both must write the same elements, with the same bits, and nothing
// else. What is expanded or quantized is compared with the scalar definition of the format too.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.h"
#include "fastlora_cpu.h"
#include "fastlora_cuda.h"

using namespace fastlora;
using gpu::emulated::Machine;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

void expect(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

enum Type : int { kFp32 = 0, kBf16 = 1, kFp16 = 2, kByte = 3 };
constexpr int64_t kTypeBytes[] = {4, 2, 2, 1};

class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u), mood_(static_cast<int>(below(3))) {}

  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t end) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(end)); }
  bool once_in(int64_t times) { return below(times) == 0; }
  template <class T>
  T of(std::initializer_list<T> all) {
    return all.begin()[below(static_cast<int64_t>(all.size()))];
  }
  int64_t size(int64_t most) {
    const int64_t edge = of<int64_t>({0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024}) + below(3) - 1;
    return std::max<int64_t>(0, once_in(3) ? below(most + 1) : std::min(edge, most));
  }
  // Whether numbers are within [-1, 1], so that every result is finite unless it took in memory that nobody wrote.
  bool tame() const { return mood_ == 0; }
  Type real() { return of({kFp32, kBf16, kFp16}); }
  int isa() { return static_cast<int>(below(fastlora_best_isa() + 1)); }

  float number() {
    const float tame = static_cast<float>(static_cast<int64_t>(bits() >> 40) - (1 << 23)) / (1 << 23);
    if (mood_ == 0) return tame;
    if (mood_ == 1) return float_of(static_cast<uint32_t>(bits()));
    if (!once_in(4)) return tame * std::pow(10.0f, static_cast<float>(below(77) - 38));
    return of({0.0f, -0.0f, INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN, FLT_TRUE_MIN, -1e-40f, 65504.0f,
               65520.0f, 6e-8f, 3.39e38f, 1e-38f});
  }

 private:
  uint64_t state_;
  int mood_;
};

// Elements on the heap, with nothing before or after them that may be touched; torch gives no elements no address.
class Array {
 public:
  // `shift` elements before the first make its address an odd one.
  Array(Type type, int64_t count, int64_t shift = 0) : type_(type), count_(count), shift_(shift) {
    void* p = nullptr;
    if (count > 0 && posix_memalign(&p, 16, (count + shift) * kTypeBytes[type]) != 0) fail("out of memory");
    memory_.reset(static_cast<uint8_t*>(p), std::free);
  }
  Array(Draw& draw, Type type, int64_t count, int64_t shift) : Array(type, count, shift) {
    for (int64_t i = 0; i < count; ++i) {
      if (type == kFp32) as<float>()[i] = draw.number();
      if (type == kBf16) from_float(draw.number(), as<Bf16>() + i);
      if (type == kFp16) from_float(draw.number(), as<Half>() + i);
      if (type == kByte) as<uint8_t>()[i] = static_cast<uint8_t>(draw.bits());
    }
  }
  Array(Draw& draw, Type type, int64_t count) : Array(draw, type, count, draw.once_in(3) ? 1 + draw.below(9) : 0) {}

  template <class T>
  T* as() const {
    return count_ > 0 ? reinterpret_cast<T*>(memory_.get() + shift_ * kTypeBytes[type_]) : nullptr;
  }
  void* data() const { return as<void>(); }
  Type type() const { return type_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * kTypeBytes[type_]; }

 private:
  Type type_;
  int64_t count_, shift_;
  std::shared_ptr<uint8_t> memory_;
};

// The elements of a matrix with these strides.
int64_t extent(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1) {
  return rows > 0 && cols > 0 ? (rows - 1) * row_stride + (cols - 1) * col_stride + 1 : 0;
}

// Rows that follow on from one another, lie apart, or are all the same one.
int64_t row_stride(Draw& draw, int64_t cols) { return draw.of<int64_t>({cols, cols, cols + draw.below(40), 0}); }

// Where a call writes: [rows, cols], of any strides.
struct Result {
  Array array;
  int64_t rows, cols, row_stride, col_stride;

  Result(Draw& draw, Type type, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1)
      : array(draw, type, extent(rows, cols, row_stride, col_stride)),
        rows(rows),
        cols(cols),
        row_stride(row_stride),
        col_stride(col_stride) {}
  Result(Draw& draw, Type type, int64_t rows, int64_t cols) : Result(draw, type, rows, cols, cols) {}

  // What its elements are; NaN is like any other NaN.
  std::vector<uint32_t> read(uint8_t fill) const {
    std::vector<bool> mine(array.count());
    std::vector<uint32_t> values;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t at = r * row_stride + c * col_stride;
        mine[at] = true;
        values.push_back(array.type() == kByte ? array.as<uint8_t>()[at] : bits_of(at_as_float(at)));
        if (array.type() != kByte && std::isnan(at_as_float(at))) values.back() = 0x7fc00000;
      }
    }
    const int64_t size = kTypeBytes[array.type()];
    for (int64_t i = 0; i < array.bytes(); ++i) {
      expect(mine[i / size] || array.as<uint8_t>()[i] == fill, "an element that is not of the result was written");
    }
    return values;
  }
  float at_as_float(int64_t at) const {
    if (array.type() == kFp32) return array.as<float>()[at];
    return array.type() == kBf16 ? to_float(array.as<Bf16>()[at]) : to_float(array.as<Half>()[at]);
  }
};

// Calls with one thread, then with others from a thread that is new, so that what a thread keeps from call to call is.
void twice(Draw& draw, const std::vector<const Result*>& results, const std::function<int(int threads)>& call) {
  std::vector<std::vector<uint32_t>> first;
  const int threads = draw.of({1, 2, 3, 5});
  for (const uint8_t fill : {uint8_t{0x5a}, uint8_t{0xff}}) {
    for (const Result* result : results) {
      if (result->array.count() > 0) std::memset(result->array.data(), fill, result->array.bytes());
    }
    int status = 0;
    if (fill == 0x5a) {
      status = call(1);
    } else {
      std::thread([&] { status = call(threads); }).join();
    }
    expect(status == 0, "status " + std::to_string(status));
    for (size_t i = 0; i < results.size(); ++i) {
      const std::vector<uint32_t> values = results[i]->read(fill);
      if (fill == 0x5a) {
        first.push_back(values);
        continue;
      }
      for (size_t at = 0; at < values.size(); ++at) {
        expect(values[at] == first[i][at], "result " + std::to_string(i) + ", element " + std::to_string(at) +
                                               ": not written, or another with other threads");
        const bool infinite = results[i]->array.type() != kByte && !std::isfinite(float_of(values[at]));
        expect(!draw.tame() || !infinite, "result " + std::to_string(i) + " is not finite");
      }
    }
  }
}

struct Weight {
  Array codes, absmax, absmax2, code2, offset;
  Nf4Weight nf4;

  Weight(Draw& draw, int64_t rows, int64_t cols, int64_t log2_blocksize, bool aligned = false)
      : Weight(draw, rows, cols, log2_blocksize, draw.once_in(2), aligned) {}
  Weight(Draw& draw, int64_t rows, int64_t cols, int64_t log2_blocksize, bool nested, bool aligned)
      : codes(draw, kByte, (rows * cols + 1) / 2, aligned ? 0 : draw.below(3)),
        absmax(draw, nested ? kByte : kFp32, blocks(rows * cols, log2_blocksize)),
        absmax2(draw, kFp32, nested ? (absmax.count() + 255) / 256 : 0),
        code2(draw, kFp32, nested ? 256 : 0),
        offset(draw, kFp32, nested ? 1 : 0),
        nf4{codes.as<uint8_t>(), absmax.data(), absmax2.as<float>(), code2.as<float>(), offset.as<float>(), rows, cols,
            log2_blocksize} {}

  static int64_t blocks(int64_t numel, int64_t log2) { return (numel + (int64_t{1} << log2) - 1) >> log2; }
};

int64_t log2_blocksize(Draw& draw) { return 5 + draw.below(8); }

struct Dropped {
  Dropout dropout;
  bool drops;

  // Of 65535, what stays is multiplied by 65536, which fp16 does not hold.
  explicit Dropped(Draw& draw)
      : dropout{draw.bits(), draw.of({0, 1, 6554, 32768, draw.tame() ? 65534 : 65535})}, drops(draw.once_in(2)) {}
  const Dropout* get() const { return drops ? &dropout : nullptr; }
};

float scaling(Draw& draw) { return draw.once_in(2) ? 2.0f : draw.number(); }

uint32_t as_result(float value, Type type) {
  Bf16 bf16;
  Half half;
  if (type == kBf16) from_float(value, &bf16), value = to_float(bf16);
  if (type == kFp16) from_float(value, &half), value = to_float(half);
  return std::isnan(value) ? 0x7fc00000 : bits_of(value);
}

void dequantize(Draw& draw) {
  const Weight w(draw, draw.size(300), draw.size(1100), log2_blocksize(draw));
  const int isa = draw.isa();
  const Result out(draw, draw.real(), w.nf4.rows, w.nf4.cols);
  twice(draw, {&out}, [&](int threads) {
    return fastlora_nf4_dequantize(&w.nf4, nullptr, nullptr, 0, 0.0f, out.array.data(), out.array.type(), isa, threads);
  });
  const std::vector<uint32_t> values = out.read(0xff);
  for (int64_t i = 0; i < w.nf4.numel(); ++i) {
    expect(values[i] == as_result(nf4_value(w.nf4, i), out.array.type()), "value " + std::to_string(i));
  }
}

void merge(Draw& draw) {
  const Weight w(draw, draw.size(140), draw.size(600), log2_blocksize(draw));
  const int64_t rank = 1 + draw.size(130);
  const int isa = draw.isa();
  const float factor = scaling(draw);
  const Array a(draw, kFp32, rank * w.nf4.cols), b(draw, kFp32, w.nf4.rows * rank);
  const Result out(draw, draw.real(), w.nf4.rows, w.nf4.cols);
  twice(draw, {&out}, [&](int threads) {
    return fastlora_nf4_dequantize(&w.nf4, a.as<float>(), b.as<float>(), rank, factor, out.array.data(),
                                   out.array.type(), isa, threads);
  });
}

void products(Draw& draw) {
  const bool transposed = draw.once_in(2);
  const Weight w(draw, draw.size(300), draw.size(1100), log2_blocksize(draw));
  const int64_t tokens = draw.size(40);
  const int64_t inner = transposed ? w.nf4.rows : w.nf4.cols, outer = transposed ? w.nf4.cols : w.nf4.rows;
  const int isa = draw.isa();
  const Array x(draw, draw.real(), tokens * inner);
  const Result out(draw, draw.real(), tokens, outer);
  const auto entry = transposed ? fastlora_nf4_gemv_t : fastlora_nf4_gemv;
  twice(draw, {&out}, [&](int threads) {
    return entry(&w.nf4, x.data(), x.type(), tokens, out.array.data(), out.array.type(), isa, threads);
  });
}

void quantize(Draw& draw) {
  const int64_t numel = draw.size(1100) * (1 + draw.size(200)) + draw.below(2), log2 = log2_blocksize(draw);
  const int isa = draw.isa();
  const Array w(draw, draw.real(), numel);
  const Result codes(draw, kByte, 1, (numel + 1) / 2), absmax(draw, kFp32, 1, Weight::blocks(numel, log2));
  const auto call = [&](int isa, int threads) {
    return fastlora_nf4_quantize(w.data(), w.type(), numel, log2, codes.array.as<uint8_t>(), absmax.array.as<float>(),
                                 isa, threads);
  };
  twice(draw, {&codes, &absmax}, [&](int threads) { return call(isa, threads); });
  const auto found = codes.read(0xff), scales = absmax.read(0xff);
  expect(call(0, 1) == 0, "portable");
  expect(found == codes.read(0xff) && scales == absmax.read(0xff), "isa " + std::to_string(isa) + " differs");
}

void quantize_scales(Draw& draw) {
  const int64_t blocks = draw.size(1100) * (1 + draw.size(100));
  const Array absmax(draw, kFp32, blocks), table(draw, kByte, 65536);
  const float offset = draw.number();
  const Result levels(draw, kByte, 1, blocks), absmax2(draw, kFp32, 1, (blocks + 255) / 256);
  twice(draw, {&levels, &absmax2}, [&](int threads) {
    return fastlora_nf4_quantize_scales(absmax.as<float>(), blocks, offset, table.as<uint8_t>(),
                                        levels.array.as<uint8_t>(), absmax2.array.as<float>(), threads);
  });
}

void shrink(Draw& draw) {
  const int64_t rows = draw.size(150), cols = draw.size(1300), rank = draw.size(130);
  const int64_t x_stride = row_stride(draw, cols);
  const bool by_column = draw.once_in(3);
  const int64_t apart = draw.of<int64_t>({0, 0, 5});
  const int64_t a_row = by_column ? 1 : cols + apart, a_col = by_column ? rank + apart : 1;
  const Array data(draw, draw.real(), extent(rows, cols, x_stride)), a(draw, kFp32, extent(rank, cols, a_row, a_col));
  const Activations x{data.data(), rows, cols, x_stride, data.type()};
  const Dropped dropped(draw);
  const float factor = scaling(draw);
  const int isa = draw.isa();
  const Result out(draw, kFp32, rows, rank);
  twice(draw, {&out}, [&](int threads) {
    return fastlora_lora_shrink(&x, dropped.get(), a.as<float>(), rank, a_row, a_col, factor, out.array.as<float>(),
                                isa, threads);
  });
}

void outer(Draw& draw) {
  const int64_t rows = draw.once_in(10) ? 1000 + draw.below(2000) : draw.size(150);
  const int64_t cols = draw.size(rows > 200 ? 70 : 1300), rank = draw.size(130);
  const int64_t x_stride = row_stride(draw, cols), apart = draw.of<int64_t>({0, 0, 5});
  const bool by_column = draw.once_in(3);
  const Array data(draw, draw.real(), extent(rows, cols, x_stride)), g(draw, kFp32, rows * rank);
  const Activations x{data.data(), rows, cols, x_stride, data.type()};
  const Dropped dropped(draw);
  const float factor = scaling(draw);
  const int isa = draw.isa();
  const Result out(draw, kFp32, rank, cols, by_column ? 1 : cols + apart, by_column ? rank + apart : 1);
  twice(draw, {&out}, [&](int threads) {
    return fastlora_lora_outer(&x, dropped.get(), g.as<float>(), rank, factor, out.array.as<float>(), out.row_stride,
                               out.col_stride, isa, threads);
  });
}

void mask(Draw& draw) {
  const Dropped dropped(draw);
  const int isa = draw.isa();
  const Result out(draw, draw.real(), draw.size(300), draw.size(1100));
  const auto call = [&](int isa, int threads) {
    return fastlora_dropout_mask(&dropped.dropout, out.rows, out.cols, out.array.data(), out.array.type(), isa,
                                 threads);
  };
  twice(draw, {&out}, [&](int threads) { return call(isa, threads); });
  const auto found = out.read(0xff);
  expect(call(0, 1) == 0 && found == out.read(0xff), "isa " + std::to_string(isa) + " differs");
}

// A LoRA linear and its operands.
struct Linear {
  bool packed;
  int64_t tokens, n, k, rank, w_stride;
  Weight w;
  Array dense, a, b;
  LoraLinear linear;

  explicit Linear(Draw& draw)
      : packed(draw.once_in(2)),
        tokens(draw.once_in(8) ? 500 + draw.below(700) : draw.size(140)),
        n(draw.size(tokens > 200 ? 100 : 700) / 2 * 2),
        k(draw.once_in(12) && tokens < 20 ? 8160 + 32 * draw.below(8) : draw.size(tokens > 200 ? 600 : 1100)),
        rank(draw.once_in(4) ? 0 : draw.once_in(8) ? 512 : 1 + draw.size(80)),
        w_stride(round(k) + draw.of<int64_t>({0, 0, 2, 7})),
        w(draw, packed ? n : 0, packed ? round(k) : 0, log2_blocksize(draw)),
        dense(draw, kBf16, packed ? 0 : extent(n, round(k), w_stride)),
        a(draw, draw.of({kFp32, kBf16}), rank * round(k)),
        b(draw, a.type(), n * rank) {
    k = round(k);
    linear = {packed ? nullptr : dense.data(), w_stride, w.nf4, a.data(), b.data(), rank, Dropped(draw).dropout,
              scaling(draw), a.type()};
    linear.nf4.rows = n;
    linear.nf4.cols = k;
    if (draw.once_in(2)) linear.dropout.threshold = -1;
  }
  int64_t round(int64_t k) const { return packed ? k / 32 * 32 : k / 2 * 2; }
};

void forward(Draw& draw) {
  if (fastlora_best_isa() < 3) return;
  const Linear f(draw);
  const int64_t stride = row_stride(draw, f.k);
  const Array x(draw, kBf16, extent(f.tokens, f.k, stride)), bias(draw, kFp32, draw.once_in(2) ? 0 : f.n);
  const Result y(draw, kBf16, f.tokens, f.n), h(draw, kFp32, f.tokens, draw.once_in(2) ? 0 : f.rank);
  twice(draw, {&y, &h}, [&](int threads) {
    return fastlora_linear(&f.linear, x.data(), f.tokens, stride, bias.as<float>(), y.array.data(), h.array.as<float>(),
                           3, threads);
  });
}

void backward(Draw& draw) {
  if (fastlora_best_isa() < 3) return;
  const Linear f(draw);
  const int64_t dy_stride = row_stride(draw, f.n), x_stride = row_stride(draw, f.k);
  const bool of_x = draw.once_in(2), of_a = draw.once_in(2) && f.rank > 0, of_b = draw.once_in(2) && f.rank > 0;
  const Array dy(draw, kBf16, extent(f.tokens, f.n, dy_stride));
  const Array x(draw, kBf16, of_a ? extent(f.tokens, f.k, x_stride) : 0);
  const Array h(draw, kFp32, of_b ? f.tokens * f.rank : 0);
  const Result dx(draw, kBf16, of_x ? f.tokens : 0, f.k), da(draw, f.a.type(), of_a ? f.rank : 0, f.k);
  const Result db(draw, f.a.type(), of_b ? f.n : 0, f.rank);
  twice(draw, {&dx, &da, &db}, [&](int threads) {
    return fastlora_linear_backward(&f.linear, dy.data(), f.tokens, dy_stride, x.data(), x_stride, h.as<float>(),
                                    dx.array.data(), da.array.data(), db.array.data(), 3, threads);
  });
}

void no_such_isa(Draw& draw) {
  const Weight w(draw, 1, 1, 5);
  for (const int isa : {-1, fastlora_best_isa() + 1, 1000}) {
    expect(fastlora_nf4_dequantize(&w.nf4, nullptr, nullptr, 0, 0, nullptr, 0, isa, 1) == FASTLORA_NO_ISA, "isa");
  }
}

void decode(Draw& draw) {
  const Type type = draw.of({kBf16, kFp16}), adapter = draw.of({kFp32, type}), of_bias = draw.of({kFp32, type});
  const int64_t log2 = 5 + draw.below(4), step = std::max<int64_t>(64, int64_t{1} << log2);
  const int64_t tokens = 1 + draw.below(16), k = step * (1 + draw.below(1 + 1400 / step)), n = 1 + draw.size(90);
  const int64_t rank = draw.once_in(4) ? 0 : 1 + draw.size(40), stride = k + draw.of<int64_t>({0, 8, 64});
  const Weight w(draw, n, k, log2, true);
  const int64_t shift = draw.once_in(8) ? 1 : 0;
  const Array x(draw, type, extent(tokens, k, stride), shift);
  const Array a(draw, adapter, rank * k, 0), b(draw, adapter, n * rank, 0);
  const Array bias(draw, of_bias, draw.once_in(2) ? 0 : n);
  Machine& machine = Machine::get();
  machine.multiprocessors = static_cast<int>(1 + draw.below(4));
  machine.blocks_each = static_cast<int>(1 + draw.below(2));
  const int64_t bytes = fastlora_cuda_decode_workspace(tokens, n, k, log2, rank, type, 0);
  expect(bytes > 0, "workspace " + std::to_string(bytes));
  const Array workspace(kByte, bytes);
  const Result out(draw, type, tokens, n);
  machine.memory.clear();
  for (const Array* each : {&w.codes, &w.absmax, &w.absmax2, &w.code2, &w.offset, &x, &a, &b, &bias}) {
    machine.memory.push_back({each->as<uint8_t>(), each->as<uint8_t>() + each->bytes(), false});
  }
  for (const Array* each : {&workspace, &out.array}) {
    machine.memory.push_back({each->as<uint8_t>(), each->as<uint8_t>() + each->bytes(), true});
  }
  const CudaDecode given{w.nf4, x.data(), stride, tokens, a.data(), b.data(), rank, bias.data(), out.array.data(),
                         workspace.data(), scaling(draw), type, adapter, of_bias, 0};
  if (shift != 0) {
    expect(fastlora_cuda_decode(&given, nullptr) == FASTLORA_CUDA_MISALIGNED, "a misaligned x was taken");
    return;
  }
  twice(draw, {&out}, [&](int) {
    machine.lot = draw.bits();
    const int status = fastlora_cuda_decode(&given, nullptr);
    if (status != 0) fail(fastlora_cuda_message(status));
    return status;
  });
}

// Sizes that no kernel takes are refused before anything is read.
void decode_refuses(Draw& draw) {
  const auto any = [&] {
    return draw.of<int64_t>({0, 1, 16, 64, 100, -1, -64, INT64_MAX, INT64_MIN, static_cast<int64_t>(draw.bits())});
  };
  CudaDecode given{};
  given.weight.rows = any(), given.weight.cols = any(), given.weight.log2_blocksize = any();
  given.tokens = any(), given.rank = any(), given.x_dtype = static_cast<int>(draw.below(5) - 1);
  const int64_t bytes =
      fastlora_cuda_decode_workspace(given.tokens, given.weight.rows, given.weight.cols, given.weight.log2_blocksize,
                                     given.rank, given.x_dtype, 0);
  if (bytes < 0) expect(fastlora_cuda_decode(&given, nullptr) == bytes, "workspace and decode disagree");
}

struct Entry {
  const char* name;
  void (*run)(Draw&);
};
// One is drawn a case; whole linears twice as often.
constexpr Entry kEntries[] = {{"dequantize", dequantize},
                              {"merge", merge},
                              {"products", products},
                              {"quantize", quantize},
                              {"quantize_scales", quantize_scales},
                              {"shrink", shrink},
                              {"outer", outer},
                              {"mask", mask},
                              {"forward", forward},
                              {"forward", forward},
                              {"backward", backward},
                              {"backward", backward},
                              {"no_such_isa", no_such_isa},
                              {"decode", decode},
                              {"decode_refuses", decode_refuses}};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: fuzz SEED CASES\n");
    return 2;
  }
  const uint64_t seed = std::strtoull(arguments[1], nullptr, 10), cases = std::strtoull(arguments[2], nullptr, 10);
  for (uint64_t i = seed; i < seed + cases; ++i) {
    Draw draw(i);
    const Entry& entry = kEntries[draw.below(sizeof kEntries / sizeof *kEntries)];
    std::fprintf(stderr, "case %llu: %s\n", static_cast<unsigned long long>(i), entry.name);
    entry.run(draw);
  }
  std::printf("%llu cases\n", static_cast<unsigned long long>(cases));
}
