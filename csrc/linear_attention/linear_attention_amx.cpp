// The inner loops of ReLU linear attention on AMX tiles, for heads of 32 channels (SANA's) in bf16; everything else goes to
// vectors (linear_attention_vector.h).
//
//   state   S = relu(k)^T v, 32 x 32 sums in four tiles for up to 128 tokens of a head. Tiles multiply pairs of tokens: v's
//           are interleaved, as the right operand wants them; k's also, and then transposed, as the left one does
//   finish  S as the sum of two bf16, high + low, which keeps 16 bits of it: the right operand of
//   apply   y = relu(q) S, 32 tokens of a head; and relu(q) . z the same way, with z in all 16 columns, so that every row
//           has its normaliser in a vector
//
// Bound: shuffles, about 256 for the state of 32 tokens (128 of them the transposition), beside 4 products of 16 cycles;
// apply is 12 products beside some 15 vector instructions a token. On vectors they are 1056 and 2112 multiply-adds.
#include "common/avx512.h"
#include "common/tiles.h"
#include "gemm/multiply_amx.h"
#include "linear_attention/linear_attention_vector.h"

namespace sana {
namespace {

constexpr int64_t kD = 32;                     // channels of a head
constexpr int64_t kStepTokens = 32;            // of a step of tiles: 16 pairs
constexpr int64_t kMostSteps = 4;              // of a product
constexpr int kTileUnits = 16 * 16;            // 32-bit units of a tile
constexpr int64_t kPitch = kD;                 // of S
using HeadTokens = Tokens<BF16, kD / kLanes>;  // with norm, or to load

// Rounding q after a norm to bf16, where it is the reference that does so.
bool on_tiles(const LinearAttention& p) {
  const bool rounded = (p.q_norm == nullptr || p.q_norm_dtype == DType::bf16) &&
                       (p.k_norm == nullptr || p.k_norm_dtype == DType::bf16);
  return p.D == kD && p.dtype == DType::bf16 && rounded;
}

__m512i load(const HeadTokens& tokens, int64_t n, int64_t h) {
  const uint16_t* const x = tokens.data + n * tokens.token_stride + h * tokens.head_stride;
  _mm_prefetch(reinterpret_cast<const char*>(x + kHeadsAhead * tokens.head_stride), _MM_HINT_T0);
  return _mm512_loadu_si512(x);
}

// relu(x) of a head's channels, or relu(norm(x)): what is not between -0 and -infinity.
__m512i features(const HeadTokens& tokens, int64_t n, int64_t h, const float* weight, float scale) {
  if (weight != nullptr)
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(tokens.feature(n, h, 1, weight, scale),
                                                         tokens.feature(n, h, 0, weight, scale)));
  const __m512i x = load(tokens, n, h), above = _mm512_sub_epi16(x, _mm512_set1_epi16(short(0x8000)));
  return _mm512_maskz_mov_epi16(_mm512_cmpgt_epu16_mask(above, _mm512_set1_epi16(0x7f80)), x);
}

// Channel i of both tokens as a pair: the first 16 pairs, and the others.
struct TokenPair {
  __m512i low, high;

  TokenPair(__m512i even, __m512i odd) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpack works on halves of 128 bits
    even = _mm512_permutexvar_epi64(order, even), odd = _mm512_permutexvar_epi64(order, odd);
    low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
  }
};

// Rows of 16 units become columns: row i of the result goes to `to + i * pitch`.
void store_transposed(const __m512i (&rows)[16], int32_t* to, int64_t pitch) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: column j of each quarter, of rows i to i + 3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);  // quarters 0 and 2 of rows 0 to 7
    const __m512i odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * pitch, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(to + (4 + j) * pitch, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + (8 + j) * pitch, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(to + (12 + j) * pitch, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

void state_on_tiles(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* state) {
  const HeadTokens keys(p, p.k, p.k_stride, b), values(p, p.v, p.v_stride, b);
  constexpr int64_t kKeys = 16 * kMostSteps;  // units of a row of k^T
  alignas(64) int32_t k[kD][kKeys], v[2][kMostSteps][kTileUnits];
  float scale[kMostSteps * kStepTokens] = {};
  configure_tiles();
  for (int64_t start = first; start < last; start += kMostSteps * kStepTokens) {
    const int64_t count = last - start < kMostSteps * kStepTokens ? last - start : kMostSteps * kStepTokens;
    const int64_t steps = ceil_div(count, kStepTokens);
    for (int64_t t = 0; t < count && weight != nullptr; ++t) scale[t] = keys.inverse_rms(start + t, p.norm_eps);
    for (int64_t h = 0; h < p.H; ++h) {
      float* const S = state + h * head_state_floats(p);
      Vec z[2] = {};
      for (int64_t step = 0; step < steps; ++step) {
        __m512i low[16], high[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t t = step * kStepTokens + 2 * i;
          const auto key = [&](int64_t t) {
            return t < count ? features(keys, start + t, h, weight, scale[t]) : _mm512_setzero_si512();
          };
          const auto value = [&](int64_t t) {
            return t < count ? load(values, start + t, h) : _mm512_setzero_si512();
          };
          const TokenPair of_k(key(t), key(t + 1)), of_v(value(t), value(t + 1));
          low[i] = of_k.low, high[i] = of_k.high;
          z[0] = PairStep::madd(z[0], of_k.low, PairStep::one());
          z[1] = PairStep::madd(z[1], of_k.high, PairStep::one());
          _mm512_store_si512(v[0][step] + 16 * i, of_v.low);
          _mm512_store_si512(v[1][step] + 16 * i, of_v.high);
        }
        store_transposed(low, k[0] + 16 * step, kKeys);
        store_transposed(high, k[16] + 16 * step, kKeys);
      }
      start == first ? zero_sums() : load_sums(S, kPitch * sizeof *S);
      multiply<BFloat16>(k, sizeof k[0], v, sizeof v[0], steps);
      store_sums(S, kPitch * sizeof *S);
      for (int c = 0; c < 2; ++c) {
        float* const to = S + kD * kPitch + c * kLanes;
        F32::store(to, kAllLanes, start == first ? z[c] : F32::load(to, kAllLanes) + z[c]);
      }
    }
  }
  _tile_release();
}

// x = high + low, to 16 bits; of an infinity low is zero.
struct InTwo {
  __m256i high, low;

  explicit InTwo(Vec x) {
    high = BF16::rounded(x);
    const Vec wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    const Lanes infinite = _mm512_fpclass_ps_mask(wide, 0x18);
    low = BF16::rounded(_mm512_maskz_sub_ps(_knot_mask16(infinite), x, wide));
  }
};

// A head's rows of S, in place, as the tiles of high (channels 0 to 15, 16 to 31), then of low; z stays.
void finish_on_tiles(float* state) {
  alignas(64) int32_t tiles[4][kTileUnits];
  for (int64_t e = 0; e < kD; e += 2) {
    for (int c = 0; c < 2; ++c) {
      const float* const row = state + e * kPitch + c * kLanes;
      const InTwo even(F32::load(row, kAllLanes)), odd(F32::load(row + kPitch, kAllLanes));
      PairStep::store(tiles[c] + 8 * e, PairStep::interleave(even.high, odd.high));
      PairStep::store(tiles[2 + c] + 8 * e, PairStep::interleave(even.low, odd.low));
    }
  }
  memcpy(state, tiles, sizeof tiles);
}

void apply_on_tiles(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last,
                    const float* state, void* rows) {
  const HeadTokens queries(p, p.q, p.q_stride, b);
  alignas(64) uint16_t q[kStepTokens][kD] = {};
  alignas(64) int32_t z[2][kTileUnits];  // its high parts, and its low ones
  alignas(64) float y[kStepTokens][kD], normaliser[kStepTokens][kD];
  float scale[kStepTokens] = {};
  configure_tiles();
  for (int64_t start = first; start < last; start += kStepTokens) {
    const int64_t count = last - start < kStepTokens ? last - start : kStepTokens;
    for (int64_t t = 0; t < count && weight != nullptr; ++t) scale[t] = queries.inverse_rms(start + t, p.norm_eps);
    for (int64_t h = 0; h < p.H; ++h) {
      const float* const tiles = state + h * head_state_floats(p);
      for (int64_t t = 0; t < count; ++t) _mm512_store_si512(q[t], features(queries, start + t, h, weight, scale[t]));
      alignas(64) int32_t pairs[2][16];
      for (int c = 0; c < 2; ++c) {
        const InTwo part(F32::load(tiles + kD * kPitch + c * kLanes, kAllLanes));
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[0] + 8 * c), part.high);
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[1] + 8 * c), part.low);
      }
      for (int i = 0; i < 16; ++i)
        for (int c = 0; c < 2; ++c) PairStep::store(z[c] + 16 * i, PairStep::broadcast(&pairs[c][i]));

      zero_sums();
      multiply<BFloat16>(q, sizeof q[0], tiles, sizeof z[0], 1);
      multiply<BFloat16>(q, sizeof q[0], tiles + 2 * kTileUnits, sizeof z[0], 1);
      store_sums(y, sizeof y[0]);
      zero_sums();
      multiply<BFloat16>(q, sizeof q[0], z, sizeof z[0], 1);
      store_sums(normaliser, sizeof normaliser[0]);
      for (int64_t t = 0; t < count; ++t) {
        const Vec sum = F32::load(normaliser[t], kAllLanes) + F32::load(normaliser[t] + kLanes, kAllLanes);
        const Vec inverse = reciprocal(sum + set1(p.eps));
        const Vec low = F32::load(y[t], kAllLanes) * inverse, high = F32::load(y[t] + kLanes, kAllLanes) * inverse;
        uint16_t* const out = static_cast<uint16_t*>(rows) + ((start - first + t) * p.H + h) * kD;
        _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
      }
    }
  }
  _tile_release();
}

void state(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* out) {
  on_tiles(p) ? state_on_tiles(p, weight, b, first, last, out) : state_any<PairStep>(p, weight, b, first, last, out);
}

void finish(const LinearAttention& p, float* state) {
  if (on_tiles(p)) finish_on_tiles(state);
}

void apply(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, const float* state,
           void* out) {
  on_tiles(p) ? apply_on_tiles(p, weight, b, first, last, state, out)
              : apply_any(p, weight, b, first, last, state, out);
}

}  // namespace

const LinearAttentionKernels linear_attention_amx = {state, finish, apply};

}  // namespace sana
