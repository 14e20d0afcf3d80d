// Matrix product on AMX tiles: 16 x 16 sums of products of 64 bytes of K in one instruction.
//
// Blocks: 32 rows x 32 columns in four tiles of sums (0-3), two tiles of x (4, 5), two of weights (6, 7). A step over 64
// bytes of K is 4 loads and 4 products, of 16 cycles each. 32 rows of x, of at most 18 steps (36 KB), stay in the
// first-level cache, where a tile load takes 8 cycles; weights stream from the second with the non-temporal hint
// (tileloaddt1), without which they would push x out. Longer rows are done in equal parts of at most 18 steps; between
// the parts the sums of 512 columns wait in a buffer on the stack.
//
// The next 32 rows of x are prefetched into the second-level cache meanwhile: out of order alone, a core sees two steps
// ahead, less than the last cache's latency. Weights that a core has not read yet come from memory, at perhaps 4 bytes per
// cycle, where a step wants 2 KB in 64: so the first rows, up to 256 if their x is no more than 512 KB, take turns at every
// part of 32 columns, whose weights were prefetched during the turns before. After that the block's weights are in the
// second-level cache. (Rows that are copied, and fewer than 64, take no turns.)
//
// Rows of x that lie a multiple of 1 KB apart would meet in a few sets of the first-level cache (K = 2048 and 9216 of the text
// encoder): such rows are copied to where they are 64 bytes more apart.
//
// Tile products run beside vector instructions. So the epilogue of a block is spread over the steps of the next block, a
// few rows per step: its sums lie in one of two buffers meanwhile.
//
// Bound: the products, 32 x 32 x 64 multiply-adds in 64 cycles.
#include "common/avx512.h"
#include "common/tiles.h"
#include "gemm/epilogue.h"
#include "gemm/multiply_amx.h"

namespace sana {
namespace {

constexpr int kChunk = 512;  // columns whose sums of 32 rows wait between two parts of K
// Rows that take turns at weights that come from memory: at most, and their bytes, which stay in the second-level cache.
constexpr int64_t kTogether = 8 * kRows, kTogetherBytes = 512 << 10;

// Sums of a block that wait for the next part of K, or for the epilogue.
template <class T>
struct alignas(64) Sums {
  typename T::Sum at[kRows][kColumns];
};

// Stores that go past the caches; `x` is aligned to the size of the store, and two stores of 16 bits fill a cache line.
template <class E>
struct Streamed {
  static void store(typename E::Type* x, Lanes, Vec y) {
    if constexpr (sizeof *x == 4)
      _mm512_stream_ps(x, y);
    else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(x), E::rounded(y));
  }
};

constexpr int kFirstLevel = 3, kSecondLevel = 2;  // caches, as __builtin_prefetch numbers them

// Rows that are wanted soon, fetched a few cache lines at a time.
template <int kLocality>
struct Ahead {
  const char* row;
  int64_t stride, bytes;  // bytes: a multiple of a line
  int rows;
  int64_t k = 0;

  void run(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + k, 0, kLocality);
      if ((k += kLine) == bytes) row += stride, k = 0, --rows;
    }
  }
};

// What runs beside the steps of a block: the epilogue of the one before, a few rows at a time, and fetching what is wanted
// soon: rows of x, weights, and the block's residual for its own epilogue.
template <class T, class E, class Out>
struct Pending {
  Ahead<kSecondLevel> next_x;
  const int64_t lines_of_x, lines_of_weights;  // at a step
  Epilogue<E, 2, Out> finish;
  Ahead<kFirstLevel> weights = {}, residual = {};
  const Sums<T>* sums = nullptr;
  int64_t m = 0;
  int row = 0, rows = 0;

  void run(int count) {
    next_x.run(lines_of_x);
    weights.run(lines_of_weights);
    residual.run(count * residual.bytes / kLine);
    for (const int end = row + count < rows ? row + count : rows; row < end; ++row)
      finish(m + row, {T::load(&sums->at[row][0]), T::load(&sums->at[row][16])});
  }
};

// Rows m to m + rows - 1 of the result, in the columns of `block`: at most 32, or a multiple of 32, which then take turns at
// every 32 columns. `x`: these rows, of which the last of 32 may be padding.
template <class T, class E, class Out>
void panels(const Gemm& p, const char* x, int64_t stride, int64_t m, int64_t rows, const Block& block,
            const Ahead<kSecondLevel>& next_x) {
  constexpr int64_t kBytes = sizeof(typename E::Type);
  const bool fresh = rows > kRows;  // weights, which are fetched a part ahead
  const int64_t turns = (rows + kRows - 1) / kRows, columns = fresh ? kColumns : kChunk;
  const int64_t blocks = (block.last_column - block.first_column + kColumns - 1) / kColumns * turns;
  const int64_t bytes = row_bytes(p), steps = bytes / 64;
  const int64_t parts = (steps + kSteps - 1) / kSteps, part = (steps + parts - 1) / parts;
  Sums<T> waiting[kChunk / kColumns], done[2];
  Pending<T, E, Out> pending{next_x, (kRows + blocks - 1) / blocks, 2 * 16 / turns + 1,
                             {p, block.first_column, kAllLanes, 0}};
  int buffer = 0;
  for (int64_t chunk = block.first_column; chunk < block.last_column; chunk += columns) {
    const int64_t end = chunk + columns < block.last_column ? chunk + columns : block.last_column;
    for (int64_t first = 0; first < steps; first += part) {
      const int64_t count = steps - first < part ? steps - first : part;
      const bool last = first + count == steps;
      Sums<T>* partial = waiting;
      for (int64_t n = chunk; n < end; n += kColumns) {
        const bool whole = n + kColumns <= block.last_column;  // else the second half is a copy of the first
        const char* weight = static_cast<const char*>(p.weight) + n * bytes + 1024 * first;
        if (fresh) {  // of the same columns, or of the next
          const char* const next = weight + (last ? kColumns * bytes - 1024 * first : 1024 * count);
          const int64_t left = last ? block.last_column - n - kColumns : kColumns;
          const int64_t soon = last ? part : steps - first - count < part ? steps - first - count : part;
          pending.weights = {next, 16 * bytes, 1024 * soon, left <= 0 ? 0 : left < kColumns ? 1 : 2};
        }
        for (int64_t i = 0; i < rows; i += kRows, ++partial) {
          const int left = int(rows - i < kRows ? rows - i : kRows);
          if (last && p.residual != nullptr)
            pending.residual = {static_cast<const char*>(p.residual) + ((m + i) * p.out_stride + n) * kBytes,
                                p.out_stride * kBytes, kColumns * kBytes, left};
          first == 0 ? zero_sums() : load_sums(partial, sizeof partial->at[0]);
          multiply<T>(x + i * stride + 64 * first, stride, weight, whole ? 16 * bytes : 0, count, pending);
          if (!last) {
            store_sums(partial, sizeof partial->at[0]);
            continue;
          }
          pending.run(kRows);
          buffer = 1 - buffer;
          store_sums(&done[buffer], sizeof done[buffer].at[0]);
          pending.finish = {p, n, kAllLanes, whole ? 16 : 0};
          pending.sums = &done[buffer];
          pending.m = m + i;
          pending.row = 0, pending.rows = left;
        }
      }
    }
  }
  pending.run(kRows);
}

template <class T, class E, class Out>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  const int64_t bytes = row_bytes(p), apart = bytes + kLine;
  configure_tiles();
  const int64_t fitting = kTogetherBytes / bytes / kRows * kRows;
  int64_t together = !block.fresh || fitting < kRows ? kRows : fitting < kTogether ? fitting : kTogether;
  for (int64_t m = block.first_row, rows; m < block.last_row; m += rows, together = kRows) {
    const char* x = static_cast<const char*>(p.x) + m * p.x_stride;
    const int64_t left = block.last_row - m;
    const bool copied = left < kRows || p.x_stride % 1024 == 0;
    rows = left < kRows ? left : copied ? kRows : left < together ? left / kRows * kRows : together;
    const int64_t next = left - rows < kRows ? left - rows : kRows;
    const Ahead<kSecondLevel> next_x = {x + rows * p.x_stride, p.x_stride, bytes, int(next)};
    if (!copied) {
      panels<T, E, Out>(p, x, p.x_stride, m, rows, block, next_x);
      continue;
    }
    for (int64_t r = 0; r < kRows; ++r)  // tiles have 16 rows: the last ones of x may not be there
      for (int64_t k = 0; k < bytes; k += 64)
        _mm512_storeu_si512(buffer + r * apart + k,
                            r < rows ? _mm512_loadu_si512(x + r * p.x_stride + k) : _mm512_setzero_si512());
    asm volatile("" : : : "memory");  // gcc does not know that a tile load reads memory
    panels<T, E, Out>(p, buffer, apart, m, rows, block, next_x);
  }
  _tile_release();
  _mm_sfence();  // streamed stores are seen by other threads before whatever this thread does next
}

template <class T, class E>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.out_stride % 16 == 0;
  p.stream && aligned ? block_of<T, E, Streamed<E>>(p, block, buffer) : block_of<T, E, E>(p, block, buffer);
}

template <class T>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  if (p.dtype == DType::f32) return block_of<T, F32>(p, block, buffer);
  if (p.dtype == DType::f16) return block_of<T, F16>(p, block, buffer);
  block_of<T, BF16>(p, block, buffer);
}

void block(const Gemm& p, const Block& block, char* buffer) {
  is_int8(p) ? block_of<Int8>(p, block, buffer) : block_of<BFloat16>(p, block, buffer);
}

}  // namespace

const GemmKernels gemm_amx = {kRows, kColumns, 7, kRows, block};

}  // namespace sana
