// cross_attention for AMX: bf16 on tiles, the rest in float on vectors.
//
// The packed columns of cross_attention_vector.h are operand tiles already: 16 steps of 16 lanes are 16 rows of 64 bytes.
// Blocks: 32 queries x 32 columns, as gemm's. What a block of 32 queries touches (at L = 60 and D = 72: q 6 KB, scores 8
// KB, y 12 KB, keys 12 KB, values 10 KB) lies in the first-level cache.
//
// Bound: tile products, 16 cycles each: at L = 60 and D = 72 24 for the scores and 24 for the values of 32 queries, 768
// cycles. The softmax between them takes about as long.
#include "common/avx512.h"
#include "common/tiles.h"
#include "cross_attention/cross_attention_vector.h"
#include "gemm/multiply_amx.h"

namespace sana {
namespace {

struct OnTiles {
  using Step = Pair;
  static constexpr int kSteps = 16, kQueries = kRows;

  static void multiply(const Product& q) {
    written();
    for (int64_t column = 0; column < q.columns; column += 2) {
      const int64_t second = column + 1 < q.columns ? 4 * q.b_pitch : 0;  // of the last column alone, a copy
      float* const sums = q.sums + column * kLanes;
      q.added ? load_sums(sums, 4 * q.pitch) : zero_sums();
      sana::multiply<BFloat16>(q.a, 4 * q.a_pitch, q.b + column * q.b_pitch, second, q.steps / kSteps);
      store_sums(sums, 4 * q.pitch);
    }
  }
};
static_assert(kColumns == 2 * kLanes && kKeys % kColumns == 0 && kMaxD % kColumns == 0, "blocks of columns end there");

void attend(const CrossAttention& p, int64_t b, int64_t h, int64_t first, int64_t last, const void* packed, void* rows) {
  configure_tiles();
  attend_any<OnTiles>(p, b, h, first, last, packed, rows);
  _tile_release();
}

}  // namespace

const CrossAttentionKernels cross_attention_amx = {packed_bytes_any<OnTiles>, pack_any<OnTiles>, attend};

}  // namespace sana
