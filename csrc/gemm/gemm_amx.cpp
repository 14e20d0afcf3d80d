// Matrix product on AMX tiles: 16 x 16 sums of products of 64 bytes of K in one instruction.
//
// Blocks: 32 rows x 32 columns in four tiles of sums (0-3), two tiles of x (4, 5), two of weights (6, 7). A step over 64
// bytes of K is 4 loads and 4 products, of 16 cycles each. 32 rows of x, of at most 18 steps (36 KB), stay in the
// first-level cache, and weights stream from the second. Longer rows are done in equal parts of at most 18 steps; between
// the parts the sums of 512 columns wait in a buffer on the stack.
//
// The next 32 rows of x are prefetched into the second-level cache meanwhile: out of order alone, a core sees two steps
// ahead, less than the last cache's latency. Weights that a core has not read yet come from memory, at perhaps 4 bytes per
// cycle, where a step wants 2 KB in 64: so the first rows, up to 256 if their x is no more than 512 KB, take turns at every
// 32 columns, whose weights, fetched during the turns before, stay in the first-level cache meanwhile while x streams.
// After that the block's weights are in the second-level cache. (Rows that are copied, and fewer than 64, take no turns.)
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

// Rows that are wanted soon, fetched a few cache lines at a time into the second-level cache: in the first they would take
// what tile loads wait for.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0;  // bytes: a multiple of a line
  int rows = 0;
  int64_t k = 0;

  void run(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + k, 0, 2);
      if ((k += kLine) == bytes) row += stride, k = 0, --rows;
    }
  }
};

// What runs beside the steps of a block: the epilogue of the one before, a few rows at a time, and fetching what is wanted
// soon: rows of x, weights, and the block's residual for its own epilogue.
template <class T, class E, class Out>
struct Pending {
  Epilogue<E, 2, Out> finish;
  Ahead x = {}, weights = {}, residual = {};
  int64_t lines_of_x = 0, lines_of_weights = 0;  // at a step
  const Sums<T>* sums = nullptr;
  int64_t m = 0;
  int row = 0, rows = 0;

  void run(int count) {
    x.run(lines_of_x);
    weights.run(lines_of_weights);
    residual.run(count * residual.bytes / kLine);
    for (const int end = row + count < rows ? row + count : rows; row < end; ++row)
      finish(m + row, {T::load(&sums->at[row][0]), T::load(&sums->at[row][16])});
  }
};

// Where sums wait: of the columns of a chunk for the next part of K, of two blocks for the epilogue.
template <class T>
struct Waiting {
  Sums<T> part[kChunk / kColumns], done[2];
  int last = 0;  // of `done`
};

// Rows m to m + rows - 1 of the result, in the columns of `block`: at most 32, or a multiple of 32, which then take turns at
// every 32 columns. `x`: these rows, of which the last of 32 may be padding; `next`: those that come after them.
template <class T, class E, class Out>
void panels(const Gemm& p, const char* x, int64_t stride, int64_t m, int64_t rows, const Block& block,
            const Ahead& next, Pending<T, E, Out>& pending, Waiting<T>& waiting) {
  constexpr int64_t kBytes = sizeof(typename E::Type);
  const int64_t turns = ceil_div(rows, kRows), columns = turns > 1 ? kColumns : kChunk;
  const int64_t blocks = ceil_div(block.last_column - block.first_column, kColumns) * turns;
  const int64_t bytes = row_bytes(p), steps = bytes / 64, part = ceil_div(steps, ceil_div(steps, kSteps));
  pending.x = next;
  pending.lines_of_x = ceil_div(kRows, blocks), pending.lines_of_weights = ceil_div(kColumns, turns);
  for (int64_t chunk = block.first_column; chunk < block.last_column; chunk += columns) {
    const int64_t end = chunk + columns < block.last_column ? chunk + columns : block.last_column;
    if (turns > 1) {  // fetch the weights of the next turns
      const int64_t panels = (block.last_column - end) / 16 < 2 ? (block.last_column - end) / 16 : 2;
      pending.weights = {static_cast<const char*>(p.weight) + end * bytes, 16 * bytes, 16 * bytes, int(panels)};
    }
    for (int64_t first = 0; first < steps; first += part) {
      const int64_t count = steps - first < part ? steps - first : part;
      const bool last = first + count == steps;
      Sums<T>* partial = waiting.part;
      for (int64_t n = chunk; n < end; n += kColumns) {
        const bool whole = n + kColumns <= block.last_column;  // else the second half is a copy of the first
        const char* weight = static_cast<const char*>(p.weight) + n * bytes + 1024 * first;
        for (int64_t i = 0; i < rows; i += kRows, ++partial) {
          const int left = int(rows - i < kRows ? rows - i : kRows);
          if (last && p.residual != nullptr)
            pending.residual = {static_cast<const char*>(p.residual) + ((m + i) * p.out_stride + n) * kBytes,
                                p.out_stride * kBytes, kColumns * kBytes, left};
          const char* const seen = x + i * stride + 64 * first;
          first == 0 ? zero_sums() : load_sums(partial, sizeof partial->at[0]);
          if (turns > 1) multiply<T, Stays::weights>(seen, stride, weight, whole ? 16 * bytes : 0, count, pending);
          else multiply<T, Stays::x>(seen, stride, weight, whole ? 16 * bytes : 0, count, pending);
          if (!last) {
            store_sums(partial, sizeof partial->at[0]);
            continue;
          }
          pending.run(kRows);
          waiting.last = 1 - waiting.last;
          Sums<T>& done = waiting.done[waiting.last];
          store_sums(&done, sizeof done.at[0]);
          pending.finish = {p, n, kAllLanes, whole ? 16 : 0};
          pending.sums = &done;
          pending.m = m + i;
          pending.row = 0, pending.rows = left;
        }
      }
    }
  }
}

template <class T, class E, class Out>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  const int64_t bytes = row_bytes(p), apart = bytes + kLine;
  configure_tiles();
  const int64_t fitting = kTogetherBytes / bytes / kRows * kRows;
  int64_t together = !block.fresh || fitting < kRows ? kRows : fitting < kTogether ? fitting : kTogether;
  Waiting<T> waiting;
  Pending<T, E, Out> pending{{p, block.first_column, kAllLanes, 0}};
  for (int64_t m = block.first_row, rows; m < block.last_row; m += rows, together = kRows) {
    const char* x = static_cast<const char*>(p.x) + m * p.x_stride;
    const int64_t left = block.last_row - m;
    const bool copied = left < kRows || p.x_stride % 1024 == 0;
    rows = left < kRows ? left : copied ? kRows : left < together ? left / kRows * kRows : together;
    const Ahead next = {x + rows * p.x_stride, p.x_stride, bytes, int(left - rows < kRows ? left - rows : kRows)};
    if (copied) {
      for (int64_t r = 0; r < kRows; ++r)  // tiles have 16 rows: the last ones of x may not be there
        for (int64_t k = 0; k < bytes; k += 64)
          _mm512_storeu_si512(buffer + r * apart + k,
                              r < rows ? _mm512_loadu_si512(x + r * p.x_stride + k) : _mm512_setzero_si512());
      written();
    }
    panels(p, copied ? buffer : x, copied ? apart : p.x_stride, m, rows, block, next, pending, waiting);
  }
  pending.run(kRows);
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
