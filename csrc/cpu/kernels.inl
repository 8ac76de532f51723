// The kernels, written once over the vector type F of W lanes that the including file defines, with load, store,
// set1, mul, fma, sum and lookup (W codes to codebook values), and for dropout over the type U of W 32-bit words.
// FASTLORA_TARGET carries the instruction set.
//
// Everything is fp32 between the codes and the one rounding at the end. A product never writes the expanded weight to
// memory: a few rows of a tile are expanded into L1 and used from there. Long sums are sums of short ones, because a
// sum in order drifts from the true sum as its length grows.

// Room for `columns` values with up to kGroup - 1 before them (a row may begin inside a group) and after them.
template <int columns>
struct Scratch {
  alignas(64) float values[columns + 2 * kGroup] = {};
};

FASTLORA_VECTOR void expand_group(const uint8_t* codes, float scale, float* out) {
  for (int i = 0; i < kGroup; i += W) store(out + i, mul(lookup(codes + i / 2), set1(scale)));
}

// The weight's last group may be cut short: its bytes are copied, so that nothing is read beyond the end.
FASTLORA_TARGET void expand_last_group(const Nf4Weight& weight, int64_t begin, float* out) {
  uint8_t codes[kGroup / 2] = {};
  std::memcpy(codes, weight.codes + begin / 2, (weight.numel() - begin + 1) / 2);
  expand_group(codes, nf4_scale(weight, begin >> weight.log2_blocksize), out);
}

// Expands `count` flat values from `begin` into `scratch` and returns the address of the first; zeros follow them up to
// the next multiple of W.
FASTLORA_VECTOR const float* expand(const Nf4Weight& weight, int64_t begin, int64_t count, float* scratch) {
  const int64_t first = begin / kGroup * kGroup;
  const int64_t whole = weight.numel() - kGroup;
  for (int64_t group = first; group < begin + count; group += kGroup) {
    float* out = scratch + (group - first);
    if (group > whole) {
      expand_last_group(weight, group, out);
    } else {
      expand_group(weight.codes + group / 2, nf4_scale(weight, group >> weight.log2_blocksize), out);
    }
  }
  float* values = scratch + (begin - first);
  for (int64_t i = count; i % W != 0; ++i) values[i] = 0.0f;
  return values;
}

template <class T>
FASTLORA_TARGET void dequantize_range(const Nf4Weight& weight, T* out, int64_t begin, int64_t end) {
  const int64_t whole = end / kGroup * kGroup;
  for (int64_t group = begin; group < whole; group += kGroup) {
    const F scale = set1(nf4_scale(weight, group >> weight.log2_blocksize));
    for (int i = 0; i < kGroup; i += W) {
      store(out + group + i, mul(lookup(weight.codes + (group + i) / 2), scale));
    }
  }
  if (whole < end) {
    float last[kGroup];
    expand_last_group(weight, whole, last);
    for (int64_t i = whole; i < end; ++i) from_float(last[i - whole], out + i);
  }
}

// out[row .. row + kRows) over one panel of columns: W + scaling * B A. The product is summed separately and added to
// the weight last, so that a small update keeps its bits until the one rounding.
template <int kRows, class T>
FASTLORA_TARGET void merge_panel(const Nf4Weight& weight, const Adapter& adapter, T* out, int64_t row, int64_t col) {
  Scratch<kPanel> scratch[kRows];
  const float* base[kRows];
  const int64_t cols = std::min<int64_t>(kPanel, weight.cols - col);
  for (int i = 0; i < kRows; ++i) base[i] = expand(weight, (row + i) * weight.cols + col, cols, scratch[i].values);
  for (int j = 0; j < cols; j += kVecs * W) {
    const float* panel = adapter.panels + col * adapter.rank + j;
    F delta[kRows][kVecs];
    for (auto& lanes : delta) {
      for (F& lane : lanes) lane = set1(0.0f);
    }
    for (int64_t r = 0; r < adapter.rank; ++r) {
      F a[kVecs];
      for (int v = 0; v < kVecs; ++v) a[v] = load(panel + r * kPanel + v * W);
      for (int i = 0; i < kRows; ++i) {
        const F b = set1(adapter.lora_b[(row + i) * adapter.rank + r]);
        for (int v = 0; v < kVecs; ++v) delta[i][v] = fma(b, a[v], delta[i][v]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      T* out_row = out + (row + i) * weight.cols + col;
      for (int v = 0; v < kVecs; ++v) {
        const int at = j + v * W;
        if (at >= cols) break;
        const F value = fma(set1(adapter.scaling), delta[i][v], load(base[i] + at));
        if (at + W <= cols) {
          store(out_row + at, value);
        } else {
          float last[W];
          store(last, value);
          for (int64_t k = at; k < cols; ++k) from_float(last[k - at], out_row + k);
        }
      }
    }
  }
}

template <class T>
FASTLORA_TARGET void merge_range(const Nf4Weight& weight, const Adapter& adapter, T* out, int64_t begin, int64_t end) {
  // Columns in strips whose part of A stays in the first-level cache, and each row written along a strip.
  const int64_t strip = std::max<int64_t>(1, kStripFloats / (kPanel * adapter.rank)) * kPanel;
  for (int64_t left = 0; left < weight.cols; left += strip) {
    const int64_t right = std::min(weight.cols, left + strip);
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) {
      for (int64_t col = left; col < right; col += kPanel) merge_panel<4>(weight, adapter, out, row, col);
    }
    for (; row < end; ++row) {
      for (int64_t col = left; col < right; col += kPanel) merge_panel<1>(weight, adapter, out, row, col);
    }
  }
}

// acc[t][i] += x[t] . rows[i] over `count` columns, a multiple of W, summed separately.
template <int kT, int kRows>
FASTLORA_VECTOR void dot_tile(const float* x, int64_t stride, const float* const* rows, int64_t count,
                              F (*acc)[kRows]) {
  F total[kT][kRows];
  for (int t = 0; t < kT; ++t) {
    for (int i = 0; i < kRows; ++i) total[t][i] = set1(0.0f);
  }
  for (int64_t k = 0; k < count; k += W) {
    F w[kRows];
    for (int i = 0; i < kRows; ++i) w[i] = load(rows[i] + k);
    for (int t = 0; t < kT; ++t) {
      const F value = load(x + t * stride + k);
      for (int i = 0; i < kRows; ++i) total[t][i] = fma(value, w[i], total[t][i]);
    }
  }
  for (int t = 0; t < kT; ++t) {
    for (int i = 0; i < kRows; ++i) acc[t][i] = acc[t][i] + total[t][i];
  }
}

// y[token .. token + tokens)[row .. row + kRows) = x Wᵀ, tokens <= kTokens.
template <int kRows, class T>
FASTLORA_TARGET void gemv_rows(const Nf4Weight& weight, const Product& product, T* y, int64_t row, int64_t token,
                               int64_t tokens) {
  Scratch<kColumnTile> scratch[kRows];
  const float* rows[kRows];
  F acc[kTokens][kRows];
  for (int64_t t = 0; t < tokens; ++t) {
    for (F& lane : acc[t]) lane = set1(0.0f);
  }
  for (int64_t col = 0; col < weight.cols; col += kColumnTile) {
    const int64_t cols = std::min<int64_t>(kColumnTile, weight.cols - col);
    for (int i = 0; i < kRows; ++i) rows[i] = expand(weight, (row + i) * weight.cols + col, cols, scratch[i].values);
    for (int64_t t = 0; t < tokens; t += 4) {
      const float* x = product.x + (token + t) * product.stride + col;
      switch (std::min<int64_t>(4, tokens - t)) {
        case 1:
          dot_tile<1>(x, product.stride, rows, cols, acc + t);
          break;
        case 2:
          dot_tile<2>(x, product.stride, rows, cols, acc + t);
          break;
        case 3:
          dot_tile<3>(x, product.stride, rows, cols, acc + t);
          break;
        default:
          dot_tile<4>(x, product.stride, rows, cols, acc + t);
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int i = 0; i < kRows; ++i) from_float(sum(acc[t][i]), y + (token + t) * weight.rows + row + i);
  }
}

template <class T>
FASTLORA_TARGET void gemv_range(const Nf4Weight& weight, const Product& product, T* y, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < product.tokens; token += kTokens) {
    const int64_t tokens = std::min<int64_t>(kTokens, product.tokens - token);
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) gemv_rows<4>(weight, product, y, row, token, tokens);
    for (; row < end; ++row) gemv_rows<1>(weight, product, y, row, token, tokens);
  }
}

// total[i] += part[i], i < count, a multiple of W.
FASTLORA_VECTOR void add_part(const float* part, int64_t count, float* total) {
  for (int64_t i = 0; i < count; i += W) store(total + i, load(total + i) + load(part + i));
}

// acc[t] += dy[t][0 .. kRows) . rows over `count` columns.
template <int kT, int kRows>
FASTLORA_VECTOR void axpy_tile(const float* dy, int64_t stride, const float* const* rows, int64_t count, float* acc) {
  for (int64_t k = 0; k < count; k += W) {
    F w[kRows];
    for (int i = 0; i < kRows; ++i) w[i] = load(rows[i] + k);
    for (int t = 0; t < kT; ++t) {
      F total = load(acc + t * kColumnTile + k);
      for (int i = 0; i < kRows; ++i) total = fma(set1(dy[t * stride + i]), w[i], total);
      store(acc + t * kColumnTile + k, total);
    }
  }
}

template <int kRows>
FASTLORA_TARGET void axpy_rows(const Nf4Weight& weight, const float* dy, int64_t stride, int64_t tokens, int64_t row,
                               int64_t col, int64_t cols, float* acc) {
  Scratch<kColumnTile> scratch[kRows];
  const float* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = expand(weight, (row + i) * weight.cols + col, cols, scratch[i].values);
  // A column of tiles strides by whole rows, which the hardware does not prefetch.
  for (int i = 0; i < kRows; ++i) {
    const uint8_t* ahead = weight.codes + ((row + i + 8) * weight.cols + col) / 2;
    for (int64_t line = 0; line < cols / 2; line += 64) __builtin_prefetch(ahead + line);
  }
  for (int64_t t = 0; t < tokens; t += 4, acc += 4 * kColumnTile, dy += 4 * stride) {
    switch (std::min<int64_t>(4, tokens - t)) {
      case 1:
        axpy_tile<1, kRows>(dy, stride, rows, cols, acc);
        break;
      case 2:
        axpy_tile<2, kRows>(dy, stride, rows, cols, acc);
        break;
      case 3:
        axpy_tile<3, kRows>(dy, stride, rows, cols, acc);
        break;
      default:
        axpy_tile<4, kRows>(dy, stride, rows, cols, acc);
    }
  }
}

// dx[:, begin .. end) = dy W. One job sums over all of N, kSummedRows at a time.
template <class T>
FASTLORA_TARGET void gemv_t_range(const Nf4Weight& weight, const Product& product, T* dx, int64_t begin, int64_t end) {
  alignas(64) float total[kTokens * kColumnTile];
  alignas(64) float part[kTokens * kColumnTile];
  for (int64_t token = 0; token < product.tokens; token += kTokens) {
    const int64_t tokens = std::min<int64_t>(kTokens, product.tokens - token), count = tokens * kColumnTile;
    std::memset(total, 0, sizeof(float) * count);
    const float* dy = product.x + token * product.stride;
    for (int64_t row = 0; row < weight.rows;) {
      const int64_t stop = std::min(weight.rows, row + kSummedRows);
      std::memset(part, 0, sizeof(float) * count);
      for (; row + 4 <= stop; row += 4) {
        axpy_rows<4>(weight, dy + row, product.stride, tokens, row, begin, end - begin, part);
      }
      for (; row < stop; ++row) {
        axpy_rows<1>(weight, dy + row, product.stride, tokens, row, begin, end - begin, part);
      }
      add_part(part, count, total);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = begin; k < end; ++k) {
        from_float(total[t * kColumnTile + k - begin], dx + (token + t) * weight.cols + k);
      }
    }
  }
}

template <class T>
FASTLORA_TARGET void widen_range(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

// Calls body with data as a pointer to its element type.
template <class Data, class Body>
void by_dtype(Data* data, Dtype dtype, const Body& body) {
  using std::conditional_t;
  constexpr bool kConst = std::is_const_v<Data>;
  switch (dtype) {
    case Dtype::kFloat:
      return body(static_cast<conditional_t<kConst, const float, float>*>(data));
    case Dtype::kBf16:
      return body(static_cast<conditional_t<kConst, const Bf16, Bf16>*>(data));
    case Dtype::kHalf:
      return body(static_cast<conditional_t<kConst, const Half, Half>*>(data));
  }
}

void dequantize(const Nf4Weight& weight, const Output& out, int64_t begin, int64_t end) {
  by_dtype(out.data, out.dtype, [&](auto* data) { dequantize_range(weight, data, begin, end); });
}

void merge(const Nf4Weight& weight, const Adapter& adapter, const Output& out, int64_t begin, int64_t end) {
  by_dtype(out.data, out.dtype, [&](auto* data) { merge_range(weight, adapter, data, begin, end); });
}

void gemv(const Nf4Weight& weight, const Product& product, int64_t begin, int64_t end) {
  by_dtype(product.out.data, product.out.dtype, [&](auto* y) { gemv_range(weight, product, y, begin, end); });
}

void gemv_t(const Nf4Weight& weight, const Product& product, int64_t begin, int64_t end) {
  by_dtype(product.out.data, product.out.dtype, [&](auto* dx) { gemv_t_range(weight, product, dx, begin, end); });
}

void widen(const void* x, Dtype dtype, int64_t count, float* out) {
  by_dtype(x, dtype, [&](auto* values) { widen_range(values, count, out); });
}

#include "lora.inl"
#include "quantize.inl"

constexpr Kernels kernels() {
  return {widen, dequantize, merge, gemv, gemv_t, quantize, lora_shrink, lora_outer, dropout_mask};
}
