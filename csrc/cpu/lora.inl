// The low-rank products of LoRA and the mask of dropout, over the vectors described in kernels.inl.
//
// Activations are read once, in their own dtype. A block of them is widened to fp32 and masked in the first-level cache
// and multiplied from there. Whichever thread runs a job, and however the result is cut into jobs, each element is
// summed in the same order: over vectors and short blocks first, then over the blocks. That also keeps fp32 sums over
// any number of elements within a few roundings of exact.

constexpr int kPanelWidth = kVecs * W;
constexpr int kChunk = kDropoutGroup * W;  // columns that one vector of Philox calls serves
static_assert(kShrinkStrip % kChunk == 0 && kOuterColumns / 2 % kChunk == 0 && kMaskJob % kChunk == 0);
static_assert(kChunk % kPanelWidth == 0 && kOuterRanks % 4 == 0 && kShrinkRows % 4 == 0);

// out[i], i < kChunk: the random bits of column i, where `counter` is that of column 0.
FASTLORA_VECTOR void random_bits(uint64_t seed, uint32_t counter, uint16_t* out) {
  U c0 = kCounters + counter, c1{}, c2{}, c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxStep0, k1 += kPhiloxStep1) {
    U high0, low0, high1, low1;
    multiply(c0, kPhiloxFactor0, &high0, &low0);
    multiply(c2, kPhiloxFactor1, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
  }
  interleave(c0, c1, c2, c3, out);
}

// kChunk values of x in fp32, times the mask, zero beyond `count`: panels of kPanelWidth, `stride` floats apart.
template <class T>
FASTLORA_VECTOR void widen_chunk(const T* x, int64_t count, const Dropout* dropout, uint32_t counter, float* out,
                                 int64_t stride) {
  alignas(64) uint16_t bits[kChunk];
  if (dropout != nullptr) random_bits(dropout->seed, counter, bits);
  for (int at = 0; at < kChunk; at += W) {
    F value;
    if (at + W <= count) {
      value = load(x + at);
    } else {
      float last[W] = {};
      for (int64_t i = at; i < count; ++i) last[i - at] = to_float(x[i]);
      value = load(last);
    }
    if (dropout != nullptr) value = mul(value, mask(bits + at, dropout->threshold, set1(dropout->kept())));
    store(out + at / kPanelWidth * stride + at % kPanelWidth, value);
  }
}

// Prefetches x[row, begin .. end), or the part of it that exists, for use after some arithmetic.
template <class T>
FASTLORA_VECTOR void fetch_ahead(const Activations& x, const T* data, int64_t row, int64_t begin, int64_t end) {
  if (row >= x.rows) return;
  const char* line = reinterpret_cast<const char*>(data + row * x.row_stride + begin);
  const char* last = reinterpret_cast<const char*>(data + row * x.row_stride + std::min(x.cols, end));
  for (; line < last; line += 64) __builtin_prefetch(line);
}

// x[row, begin .. end) likewise, begin a multiple of kChunk.
template <class T>
FASTLORA_VECTOR void widen_row(const Activations& x, const T* data, const Dropout* dropout, int64_t row, int64_t begin,
                               int64_t end, float* out, int64_t stride) {
  const int64_t groups = (x.cols + kDropoutGroup - 1) / kDropoutGroup;
  for (int64_t col = begin; col < end; col += kChunk, out += kChunk / kPanelWidth * stride) {
    const uint32_t counter = static_cast<uint32_t>(row * groups + col / kDropoutGroup);
    widen_chunk(data + row * x.row_stride + col, end - col, dropout, counter, out, stride);
  }
}

// out[t][i] += scaling * x[t] . a[i] for kT rows of x and `ranks` <= kVecs rows of A, over `count` columns.
template <int kT>
FASTLORA_TARGET void shrink_tile(const float* x, const float* const* a, int64_t count, int64_t ranks, float scaling,
                                 float* out, int64_t stride) {
  F acc[kT][kVecs];
  for (auto& lanes : acc) {
    for (F& lane : lanes) lane = set1(0.0f);
  }
  dot_tile<kT>(x, kShrinkStrip, a, count, acc);
  for (int t = 0; t < kT; ++t) {
    for (int i = 0; i < kVecs; ++i) {
      const float partial = scaling * sum(acc[t][i]);
      if (i < ranks) out[t * stride + i] += partial;
    }
  }
}

// tile: rows of x, rows of A.
template <class T>
FASTLORA_TARGET void shrink_range(const Shrink& s, const T* data, const Tile& tile) {
  alignas(64) float wide[kShrinkRows * kShrinkStrip];
  const int64_t rows = tile.row_end - tile.row_begin;
  float* out = s.out + tile.row_begin * s.rank;
  for (int64_t t = 0; t < rows; ++t) {
    std::fill(out + t * s.rank + tile.col_begin, out + t * s.rank + tile.col_end, 0.0f);
  }
  for (int64_t col = 0; col < s.x.cols; col += kShrinkStrip) {
    const int64_t count = std::min<int64_t>(kShrinkStrip, s.x.cols - col);
    for (int64_t t = 0; t < rows; ++t) {
      widen_row(s.x, data, s.dropout, tile.row_begin + t, col, col + count, wide + t * kShrinkStrip, kPanelWidth);
      fetch_ahead(s.x, data, tile.row_begin + t, col + count, col + count + kShrinkStrip);
    }
    for (int64_t r = tile.col_begin; r < tile.col_end; r += kVecs) {
      const int64_t ranks = std::min<int64_t>(kVecs, tile.col_end - r);
      const float* a[kVecs];
      for (int64_t i = 0; i < kVecs; ++i) a[i] = s.a + (r + std::min(i, ranks - 1)) * s.stride + col;
      for (int64_t t = 0; t < rows; t += 4) {
        const float* x = wide + t * kShrinkStrip;
        float* to = out + t * s.rank + r;
        switch (std::min<int64_t>(4, rows - t)) {
          case 1:
            shrink_tile<1>(x, a, count, ranks, s.scaling, to, s.rank);
            break;
          case 2:
            shrink_tile<2>(x, a, count, ranks, s.scaling, to, s.rank);
            break;
          case 3:
            shrink_tile<3>(x, a, count, ranks, s.scaling, to, s.rank);
            break;
          default:
            shrink_tile<4>(x, a, count, ranks, s.scaling, to, s.rank);
        }
      }
    }
  }
}

// acc[i] += sum over t < rows of g[i][t * stride] * x[t], for four ranks and one panel of columns.
FASTLORA_TARGET void outer_tile(const float* x, const float* const* g, int64_t stride, int64_t rows, float* acc) {
  const float *g0 = g[0], *g1 = g[1], *g2 = g[2], *g3 = g[3];
  F total[4][kVecs];
  for (auto& lanes : total) {
    for (F& lane : lanes) lane = set1(0.0f);
  }
  for (int64_t t = 0; t < rows; ++t) {
    F wide[kVecs];
    for (int v = 0; v < kVecs; ++v) wide[v] = load(x + t * kPanelWidth + v * W);
    const F factor[4] = {set1(g0[t * stride]), set1(g1[t * stride]), set1(g2[t * stride]), set1(g3[t * stride])};
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kVecs; ++v) total[i][v] = fma(factor[i], wide[v], total[i][v]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = acc + i * kOuterColumns + v * W;
      store(to, load(to) + total[i][v]);
    }
  }
}

// Stores the sums of a tile where they belong, in the order in which they are in memory.
FASTLORA_TARGET void write_outer(const Outer& o, const Tile& tile, const float* acc) {
  const int64_t ranks = tile.row_end - tile.row_begin, cols = tile.col_end - tile.col_begin;
  float* out = o.out + tile.row_begin * o.row_stride + tile.col_begin * o.col_stride;
  if (o.row_stride < o.col_stride) {
    for (int64_t k = 0; k < cols; ++k, out += o.col_stride) {
      for (int64_t r = 0; r < ranks; ++r) out[r * o.row_stride] = o.scaling * acc[r * kOuterColumns + k];
    }
    return;
  }
  for (int64_t r = 0; r < ranks; ++r, out += o.row_stride, acc += kOuterColumns) {
    int64_t k = 0;
    if (o.col_stride == 1) {
      for (; k + W <= cols; k += W) store(out + k, mul(set1(o.scaling), load(acc + k)));
    }
    for (; k < cols; ++k) out[k * o.col_stride] = o.scaling * acc[k];
  }
}

// acc [ranks][kOuterColumns] = gᵀ x over rows [begin, end) of x.
template <class T>
FASTLORA_TARGET void outer_stretch(const Outer& o, const T* data, const Tile& tile, int64_t begin, int64_t end,
                                   float* acc) {
  alignas(64) float wide[kOuterRows * kOuterColumns];
  const int64_t ranks = tile.row_end - tile.row_begin, cols = tile.col_end - tile.col_begin;
  std::memset(acc, 0, sizeof(float) * ((ranks + 3) / 4 * 4) * kOuterColumns);
  for (int64_t row = begin; row < end; row += kOuterRows) {
    const int64_t rows = std::min<int64_t>(kOuterRows, end - row);
    for (int64_t t = 0; t < rows; ++t) {
      widen_row(o.x, data, o.dropout, row + t, tile.col_begin, tile.col_end, wide + t * kPanelWidth,
                kOuterRows * kPanelWidth);
      fetch_ahead(o.x, data, row + t + kOuterRows, tile.col_begin, tile.col_end);
    }
    for (int64_t col = 0; col < cols; col += kPanelWidth) {
      for (int64_t r = 0; r < ranks; r += 4) {
        const float* g[4];
        for (int64_t i = 0; i < 4; ++i) g[i] = o.g + row * o.rank + tile.row_begin + std::min(r + i, ranks - 1);
        outer_tile(wide + col * kOuterRows, g, o.rank, rows, acc + r * kOuterColumns + col);
      }
    }
  }
}

// tile: ranks, at most kOuterRanks, and columns of x, at most kOuterColumns.
template <class T>
FASTLORA_TARGET void outer_range(const Outer& o, const T* data, const Tile& tile) {
  alignas(64) float total[kOuterRanks * kOuterColumns];
  alignas(64) float part[kOuterRanks * kOuterColumns];
  outer_stretch(o, data, tile, 0, std::min<int64_t>(kOuterStretch, o.x.rows), total);
  for (int64_t row = kOuterStretch; row < o.x.rows; row += kOuterStretch) {
    outer_stretch(o, data, tile, row, std::min(o.x.rows, row + kOuterStretch), part);
    add_part(part, (tile.row_end - tile.row_begin) * kOuterColumns, total);
  }
  write_outer(o, tile, total);
}

template <class T>
FASTLORA_TARGET void mask_range(const Dropout& dropout, T* out, uint32_t counter, int64_t begin, int64_t end) {
  alignas(64) uint16_t bits[kChunk];
  const float kept = dropout.kept();
  for (int64_t col = begin; col < end; col += kChunk) {
    random_bits(dropout.seed, counter + static_cast<uint32_t>(col / kDropoutGroup), bits);
    for (int at = 0; at < kChunk; at += W) {
      if (col + at + W <= end) {
        store(out + col + at, mask(bits + at, dropout.threshold, set1(kept)));
      } else {
        for (int64_t i = at; col + i < end && i < at + W; ++i) {
          from_float(bits[i] < dropout.threshold ? 0.0f : kept, out + col + i);
        }
      }
    }
  }
}

void lora_shrink(const Shrink& shrink, const Tile& tile) {
  by_dtype(shrink.x.data, static_cast<Dtype>(shrink.x.dtype), [&](auto* data) { shrink_range(shrink, data, tile); });
}

void lora_outer(const Outer& outer, const Tile& tile) {
  by_dtype(outer.x.data, static_cast<Dtype>(outer.x.dtype), [&](auto* data) { outer_range(outer, data, tile); });
}

void dropout_mask(const Dropout& dropout, const Output& out, uint32_t counter, int64_t begin, int64_t end) {
  by_dtype(out.data, out.dtype, [&](auto* data) { mask_range(dropout, data, counter, begin, end); });
}
