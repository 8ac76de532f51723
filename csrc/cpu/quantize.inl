// NF4 quantization over the vectors described in kernels.inl: bit for bit what bitsandbytes computes, with every
// operation rounded separately in fp32.
//
//     absmax[block] = max |w|,    code = number of midpoints between levels that are below w * (1 / absmax)

typedef int32_t I __attribute__((vector_size(4 * W)));

// The bits of the largest magnitude of `count` values, `count` a multiple of W.
template <class T>
FASTLORA_VECTOR int32_t largest(const T* values, int64_t count) {
  I most{};
  for (int64_t i = 0; i < count; i += W) {
    // Without their signs, the bits of fp32 numbers are ordered as the numbers are, NaN above infinity.
    const I bits = (I)load(values + i) & 0x7fffffff;
    const I larger = bits > most;
    most = (bits & larger) | (most & ~larger);
  }
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits = std::max<int32_t>(bits, most[i]);
  return bits;
}

// Codes of kGroup values.
template <class T>
FASTLORA_VECTOR void encode_group(const T* values, float inverse, const float* midpoints, uint8_t* codes) {
  alignas(64) int32_t index[kGroup];
  for (int i = 0; i < kGroup; i += W) {
    const F scaled = mul(load(values + i), set1(inverse));
    I level{};
    for (int m = 0; m < 15; ++m) level -= (I)(scaled > set1(midpoints[m]));
    std::memcpy(index + i, &level, sizeof level);
  }
  for (int i = 0; i < kGroup / 2; ++i) codes[i] = static_cast<uint8_t>(index[2 * i] << 4 | index[2 * i + 1]);
}

// Blocks [begin, end). The last block of all may be cut short; a half-filled byte ends in the code of zero.
template <class T>
FASTLORA_TARGET void quantize_range(const Quantize& q, const T* w, int64_t begin, int64_t end) {
  constexpr Nf4Code kLevels = nf4_code();
  constexpr float kTiny = 1e-38f;  // blocks of zeros
  constexpr int kZero = 7;
  float midpoints[15];
  for (int m = 0; m < 15; ++m) midpoints[m] = (kLevels.value[m] + kLevels.value[m + 1]) / 2;
  const int64_t blocksize = int64_t{1} << q.log2_blocksize;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * blocksize, count = std::min(blocksize, q.numel - first);
    const int64_t whole = count / kGroup * kGroup;
    T rest[kGroup] = {};
    std::memcpy(rest, w + first + whole, sizeof(T) * (count - whole));
    const float absmax = float_of(static_cast<uint32_t>(std::max(largest(w + first, whole), largest(rest, kGroup))));
    q.absmax[block] = absmax;
    const float inverse = 1.0f / std::max(absmax, kTiny);
    for (int64_t i = 0; i < whole; i += kGroup) {
      encode_group(w + first + i, inverse, midpoints, q.codes + (first + i) / 2);
    }
    if (whole == count) continue;
    uint8_t codes[kGroup / 2];
    encode_group(rest, inverse, midpoints, codes);
    const int64_t bytes = (count - whole + 1) / 2;
    if ((count - whole) % 2 != 0) codes[bytes - 1] = static_cast<uint8_t>((codes[bytes - 1] & 0xf0) | kZero);
    std::memcpy(q.codes + (first + whole) / 2, codes, bytes);
  }
}

void quantize(const Quantize& q, int64_t begin, int64_t end) {
  by_dtype(q.w, q.dtype, [&](auto* w) { quantize_range(q, w, begin, end); });
}
