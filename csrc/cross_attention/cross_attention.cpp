// Softmax attention of image tokens to text tokens on CPUs.
//
// Algorithm (sana_kernels/cross_attention/reference.py), per image and head, over blocks of text tokens, with the
// running maximum m and sum z of the online softmax (arXiv 1805.02867), all in float:
//     s[n][l] = q[n] . k[l]           m' = max(m, max_l s)          f = exp((m - m') / sqrt(D))
//     p[n][l] = exp((s - m') / sqrt(D))                             z = z f + sum_l p
//     y[n][:] = y f + sum_l p[n][l] v[l][:]                         out = y / z at the end
// SANA's captions have up to 300 tokens and fit one block. Text tokens beyond an image's length are never read. With
// bf16 dot products p is rounded to bf16 before the second product, as the library's kernels do.
//
// Layouts: q, k, v (B, N or L, H, D) with any strides but the last, out contiguous. First k and v of each head are
// packed so that a vector holds 16 text tokens of k, or 16 channels of v: a few MB once per call, 1 / N of the work.
//
// Tiling: a task is a head and up to 256 image tokens; its packed k and v (100 KB at L = 300, D = 72 in bf16) stay in
// the L2 cache. Within it, 12 queries at a time: their scores (15 KB) and the tile of k or v at hand (9 KB) stay in L1.
// (On AMX 32 queries: cross_attention_amx.cpp.) Quantised, a task is all heads of up to 128 tokens: their rows (290 KB at
// C = 1152 in bf16) are written to the cache, and go to int8 from there.
// Tokens are independent: the bytes of the result depend neither on the threads nor on the tasks.
//
// FLOPs: 4 B N L H D, and an exp per score, which is a tenth of it at D = 72. Bytes: q and out once, 4 B N H D in bf16,
// that is L FLOPs per byte: from L = 60 on the bound is arithmetic.
// Measured on one Zen 5 core (500 GFLOP/s in bf16, 251 in fp32) at D = 72: bf16 330 GFLOP/s at L = 300, and 256 at
// L = 60; fp32 184 and 152; AVX2 92 of 128. At D = 112, L = 300: bf16 380.
#include <algorithm>
#include <atomic>

#include "common/cpu_features.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "cross_attention/cross_attention_cpu.h"
#include "gemm/result_rows.h"

namespace sana {
namespace {

constexpr int64_t kTokens = 256;  // of one task
constexpr int64_t kFewestQuantized = 32, kMostQuantized = 128;  // of one that quantises

constexpr const CrossAttentionKernels* kByIsa[kIsas] = {&cross_attention_portable, SANA_AVX2(&cross_attention_avx2),
                                                        nullptr, SANA_AVX512VNNI(&cross_attention_avx512vnni),
                                                        SANA_AVX512(&cross_attention_avx512),
                                                        SANA_AMX(&cross_attention_amx)};

}  // namespace

Status cross_attention_cpu(const CrossAttention& p, int threads) {
  if (p.B < 1 || p.N < 1 || p.L < 1 || p.H < 1) return Status::bad_shape;
  if (p.D < 8 || p.D % 8 != 0 || p.D > 128) return Status::bad_head_dim;
  if (!valid(p.dtype)) return Status::bad_dtype;
  for (int64_t b = 0; b < p.B; ++b)
    if (length_of(p, b) < 1 || length_of(p, b) > p.L) return Status::bad_shape;
  const CrossAttentionKernels& kernels = choose(kByIsa);

  const int64_t heads = p.B * p.H, bytes = kernels.packed_bytes(p);
  static thread_local Scratch scratch;
  char* const packed = scratch.reserve(heads * bytes);
  if (packed == nullptr) return Status::out_of_memory;
  parallel_for(threads, heads, [&](int64_t head) { kernels.pack(p, head / p.H, head % p.H, packed + head * bytes); });

  const bool quantized = p.row_scale != nullptr;
  const int64_t share = round_up(ceil_div(p.B * p.N, 2 * threads), kFewestQuantized);
  const int64_t tokens = quantized ? std::min(share, kMostQuantized) : kTokens;
  const int64_t blocks = ceil_div(p.N, tokens), heads_of_task = quantized ? p.H : 1, groups = p.H / heads_of_task;
  const ResultRows result = {p.out, p.row_scale, p.H * p.D, p.dtype};
  std::atomic<bool> failed{false};
  parallel_for(threads, p.B * groups * blocks, [&](int64_t task) {
    const int64_t b = task / (groups * blocks), group = task / blocks % groups;
    const int64_t first = task % blocks * tokens, last = std::min(first + tokens, p.N);
    const bool written = result.write(b * p.N + first, last - first, [&](void* rows) {
      for (int64_t h = group * heads_of_task; h < (group + 1) * heads_of_task; ++h)
        kernels.attend(p, b, h, first, last, packed + (b * p.H + h) * bytes, rows);
    });
    if (!written) failed = true;
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace sana
