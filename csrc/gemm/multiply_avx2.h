// The inner loop of matrix products on vectors of 8 columns, for AVX2 and for AVX-VNNI, which differ in how they
// multiply int8. For gemm and conv2d; include common/avx2.h first.
//
// What AVX2 cannot multiply is widened, bf16 to float and int8 to 16 bits: not in the loop, where that would take as
// many instructions as the products, but before, once for many of them. Per type: `panel` brings 16 columns of weights
// into the form that the loop reads, perhaps in a buffer, and `widen` rows of x, to kTimes their bytes;
// `Multiplied::step` adds the products of 4 bytes of such a row; `result` turns sums into floats, given the row's
// `correction`; `add` adds the sum of a part of K to others, whose sums `start` begins where that is not with zero.
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

struct Float {
  using Multiplied = Float;
  static constexpr int kTimes = 1;
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

// So bf16 runs at the rate of fp32.
struct BFloat16 : Float {
  static constexpr int kTimes = 2;
  static constexpr int kBytes = kTimes * Float::kBytes;

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

  static void widen(const char* x, int64_t bytes, char* to) {
    for (int64_t k = 0; k < bytes; k += 16)
      F32::store(reinterpret_cast<float*>(to + 2 * k), kAllLanes,
                 BF16::load(reinterpret_cast<const uint16_t*>(x + k), kAllLanes));
  }
};

// Chunks of K are summed as integers, and with a scale each as floats. Without dot products, vpmaddwd and an addition.
struct Int16Chunks {
  using Multiplied = Int16Chunks;
  static constexpr int kTimes = 1;
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
  using Multiplied = Int8;
  static constexpr int kTimes = 1;
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
  using Multiplied = Int8Chunks;

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
// Without int8 dot products, those of 16 bits: vpmaddubsw would take bytes, but its 16-bit sums saturate (2 x 127 x 255
// does not fit).
struct Int8 : Int16Chunks {
  static constexpr int kTimes = 2;
  static constexpr bool kScaled = false;
  static constexpr int kBytes = kTimes * Int16Chunks::kBytes;

  // Of each column 2 of K, then the next 2 of each.
  static const char* panel(const char* weight, int64_t bytes, char* buffer) {
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));  // -1: a byte of zero
    const __m256i high = _mm256_or_si256(low, _mm256_set1_epi16(0x0200));
    for (int64_t k = 0; k < bytes; k += 4, weight += 64, buffer += kBytes) {
      for (int half = 0; half < 2; ++half) {
        const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 32 * half));
        store(buffer + 32 * half, _mm256_srai_epi16(_mm256_shuffle_epi8(four, low), 8));
        store(buffer + 64 + 32 * half, _mm256_srai_epi16(_mm256_shuffle_epi8(four, high), 8));
      }
    }
    return buffer - bytes / 4 * kBytes;
  }

  static void widen(const char* x, int64_t bytes, char* to) {
    for (int64_t k = 0; k < bytes; k += 16) store(to + 2 * k, _mm256_cvtepi8_epi16(load_16(x + k)));
  }

  static Vec result(const Sum (&sum)[kSums], int half, int) { return _mm256_cvtepi32_ps((__m256i)sum[half]); }
  static int correction(const char*, int64_t) { return 0; }

 protected:
  static __m128i load_16(const char* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
  static void store(char* to, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), x); }
};

// x is unsigned, 128 more than its values.
struct Int8Chunks : Int8 {
  static constexpr bool kScaled = true;

  static void widen(const char* x, int64_t bytes, char* to) {
    for (int64_t k = 0; k < bytes; k += 16)
      store(to + 2 * k, _mm256_sub_epi16(_mm256_cvtepu8_epi16(load_16(x + k)), _mm256_set1_epi16(128)));
  }
  static void start(Sum (&sum)[kSums], const char*) {
    for (Sum& each : sum) each = zero();
  }
};
#endif

// Adds the products of `bytes` of R rows of x and a panel of 16 columns; T: `Multiplied` of a type. Not inlined: 16
// registers hold what the loop needs and nothing of what is around it.
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
