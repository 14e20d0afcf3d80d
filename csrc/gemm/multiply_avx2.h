// The inner loop of matrix products on vectors of 8 columns, for AVX2 and for AVX-VNNI, which differ in how they
// multiply int8. For gemm and conv2d; include common/avx2.h first.
//
// Per type: `panel` brings 16 columns of weights into the form that `step` reads, perhaps in a buffer; `step` adds the
// products of 4 bytes of K; `result` turns sums into floats, given the row's `correction`; `add` adds the sum of a part
// of K to others, whose sums `start` begins where that is not with zero.
#pragma once

namespace sana {
namespace {

constexpr int kPanel = 16;    // columns
constexpr int kScratch = 32;  // bytes of the buffer for each byte of a row: the most that a type takes

inline int load_int(const char* x) {
  int value;
  memcpy(&value, x, sizeof value);
  return value;
}

// Widened to float, two vectors for each k; so bf16 runs at the rate of fp32. Per 2 of K and row: 1 broadcast, 2 shifts
// and masks, 4 multiply-adds.
struct BFloat16 {
  static constexpr bool kScaled = false;
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 2 * kPanel * 4;  // of a panel, for each 4 bytes of K
  using Sum = Vec;

  static Sum zero() { return _mm256_setzero_ps(); }

  static const char* panel(const char* weight, int64_t bytes, char* buffer) {
    const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
    for (int64_t k = 0; k < bytes; k += 4, weight += 64, buffer += kBytes) {
      for (int half = 0; half < 2; ++half) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 32 * half));
        _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + 32 * half), _mm256_slli_epi32(pairs, 16));
        _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + 64 + 32 * half), _mm256_and_si256(pairs, odd));
      }
    }
    return buffer - bytes / 4 * kBytes;
  }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    for (int j = 0; j < 2; ++j) {
      const Vec w0 = _mm256_load_ps(reinterpret_cast<const float*>(panel + 64 * j));
      const Vec w1 = _mm256_load_ps(reinterpret_cast<const float*>(panel + 64 * j + 32));
      for (int r = 0; r < R; ++r) {
        const int pair = load_int(x + r * stride);
        const Vec value = _mm256_castsi256_ps(_mm256_set1_epi32(j == 0 ? pair << 16 : pair & int(0xffff0000)));
        sum[r][0] = fmadd(value, w0, sum[r][0]);
        sum[r][1] = fmadd(value, w1, sum[r][1]);
      }
    }
  }

  static Vec result(const Sum (&sum)[kSums], int half, int) { return sum[half]; }
  static int correction(const char*, int64_t) { return 0; }
};

struct Float {
  static constexpr bool kScaled = false;
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 4 * kPanel;
  using Sum = Vec;

  static Sum zero() { return _mm256_setzero_ps(); }
  static const char* panel(const char* weight, int64_t, char*) { return weight; }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    const Vec w0 = _mm256_loadu_ps(reinterpret_cast<const float*>(panel));
    const Vec w1 = _mm256_loadu_ps(reinterpret_cast<const float*>(panel + 32));
    for (int r = 0; r < R; ++r) {
      const Vec value = _mm256_castsi256_ps(_mm256_set1_epi32(load_int(x + r * stride)));
      sum[r][0] = fmadd(value, w0, sum[r][0]);
      sum[r][1] = fmadd(value, w1, sum[r][1]);
    }
  }

  static Vec add(Vec parts, const Sum (&sum)[kSums], int half, float) { return parts + sum[half]; }
  static Vec result(const Sum (&sum)[kSums], int half, int) { return sum[half]; }
  static int correction(const char*, int64_t) { return 0; }
};

// Chunks of K are summed as integers, and with a scale each as floats. Without dot products, vpmaddwd and an addition.
struct Int16Chunks {
  static constexpr bool kScaled = true;
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 64;
  typedef int Sum __attribute__((vector_size(32)));

  static Sum zero() { return Sum{}; }
  static const char* panel(const char* weight, int64_t, char*) { return weight; }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    __m256i w[kSums];
    for (int i = 0; i < kSums; ++i) w[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * i));
    for (int r = 0; r < R; ++r) {
      const __m256i pair = _mm256_set1_epi32(load_int(x + r * stride));
      for (int i = 0; i < kSums; ++i)
#if defined(__AVXVNNI__)
        sum[r][i] = (Sum)_mm256_dpwssd_avx_epi32((__m256i)sum[r][i], w[i], pair);
#else
        sum[r][i] += (Sum)_mm256_madd_epi16(w[i], pair);
#endif
    }
  }

  static Vec add(Vec chunks, const Sum (&sum)[kSums], int half, float scale) {
    return fmadd(_mm256_cvtepi32_ps((__m256i)sum[half]), set1(scale), chunks);
  }
};

#if defined(__AVXVNNI__)
// The dot products of AVX-512 (gemm/multiply_avx512.h tells how signed bytes are multiplied).
struct Int8 {
  static constexpr bool kScaled = false;
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 64;
  // The type that the instruction computes in: with __m256i, gcc 12 copies the sums about inside the loop.
  typedef int Sum __attribute__((vector_size(32)));

  static Sum zero() { return Sum{}; }
  static const char* panel(const char* weight, int64_t, char*) { return weight; }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    __m256i w[kSums];
    for (int i = 0; i < kSums; ++i)
      w[i] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * i)), _mm256_set1_epi8(-128));
    for (int r = 0; r < R; ++r) {
      const __m256i four = _mm256_set1_epi32(load_int(x + r * stride));
      for (int i = 0; i < kSums; ++i) sum[r][i] = (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum[r][i], w[i], four);
    }
  }

  static Vec result(const Sum (&sum)[kSums], int half, int correction) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32((__m256i)sum[half], _mm256_set1_epi32(correction)));
  }

  // 128 * sum(x) of a row.
  static int correction(const char* x, int64_t bytes) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < bytes; k += 32)
      sum = _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k)));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_hadd_epi32(four, four);
    return 128 * (_mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1));
  }
};

// x is unsigned, 128 more than its values; sums start with what that adds, negative.
struct Int8Chunks : Int16Chunks {
  static void start(Sum (&sum)[kSums], const char* panel) { memcpy(sum, panel, sizeof sum); }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    __m256i w[kSums];
    for (int i = 0; i < kSums; ++i) w[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * i));
    for (int r = 0; r < R; ++r) {
      const __m256i four = _mm256_set1_epi32(load_int(x + r * stride));
      for (int i = 0; i < kSums; ++i) sum[r][i] = (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum[r][i], four, w[i]);
    }
  }
};
#else
// Without int8 dot products: bytes are widened to 16 bits, and vpmaddwd adds pairs of their products into 32.
// (vpmaddubsw would take bytes, but its 16-bit sums saturate: 2 x 127 x 255 does not fit.)
//
// Per 2 of K and row: a pair that general registers put together, 1 broadcast, 2 multiplies, 2 additions. Where rows are
// widened before (gemm_avx2.h), the pair is read by the broadcast.
struct Int8 {
  static constexpr bool kScaled = false;
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 2 * kPanel * 4;
  using Sum = Int16Chunks::Sum;

  static Sum zero() { return Sum{}; }

  // Of each column 2 of K, then the next 2 of each.
  static const char* panel(const char* weight, int64_t bytes, char* buffer) {
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));  // -1: a byte of zero
    const __m256i high = _mm256_or_si256(low, _mm256_set1_epi16(0x0200));
    for (int64_t k = 0; k < bytes; k += 4, weight += 64, buffer += kBytes)
      for (int half = 0; half < 2; ++half) {
        const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 32 * half));
        store(buffer + 32 * half, four, low);
        store(buffer + 64 + 32 * half, four, high);
      }
    return buffer - bytes / 4 * kBytes;
  }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride, int less = 0) {
    for (int j = 0; j < 2; ++j) {
      __m256i w[kSums];
      for (int i = 0; i < kSums; ++i) w[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 64 * j + 32 * i));
      for (int r = 0; r < R; ++r) {
        const char* const two = x + r * stride + 2 * j;
        const int first = less == 0 ? int8_t(two[0]) : uint8_t(two[0]) - less;
        const int second = less == 0 ? int8_t(two[1]) : uint8_t(two[1]) - less;
        const __m256i pair = _mm256_set1_epi32((first & 0xffff) | int(unsigned(second) << 16));
        for (int i = 0; i < kSums; ++i) sum[r][i] += (Sum)_mm256_madd_epi16(w[i], pair);
      }
    }
  }

  static Vec result(const Sum (&sum)[kSums], int half, int) { return _mm256_cvtepi32_ps((__m256i)sum[half]); }
  static int correction(const char*, int64_t) { return 0; }

 private:
  // Two bytes of each column, to the upper halves of 16 bits and from there down.
  static void store(char* to, __m256i four, __m256i order) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_srai_epi16(_mm256_shuffle_epi8(four, order), 8));
  }
};

// x is unsigned, 128 more than its values, which are taken off again.
struct Int8Chunks : Int8 {
  static constexpr bool kScaled = true;

  static void start(Sum (&sum)[kSums], const char*) {
    for (Sum& each : sum) each = zero();
  }
  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    Int8::step(sum, panel, x, stride, 128);
  }
  static Vec add(Vec chunks, const Sum (&sum)[kSums], int half, float scale) {
    return fmadd(result(sum, half, 0), set1(scale), chunks);
  }
};
#endif

// Adds the products of `bytes` of K: R rows of x, and a panel of 16 columns. Not inlined: 16 registers hold what the
// loop needs and nothing of what is around it.
template <class T, int R>
__attribute__((noinline)) void multiply(typename T::Sum (&sums)[R][T::kSums], const char* x, int64_t stride,
                                        const char* panel, int64_t bytes) {
  typename T::Sum sum[R][T::kSums];
  memcpy(sum, sums, sizeof sum);
  for (int64_t k = 0; k < bytes; k += 4) T::template step<R>(sum, panel + k / 4 * T::kBytes, x + k, stride);
  memcpy(sums, sum, sizeof sum);
}

}  // namespace
}  // namespace sana
