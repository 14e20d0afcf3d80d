// ReLU linear attention on CPUs.
//
// Algorithm (arXiv 2410.10629, section 2.2; sana_kernels/linear_attention/reference.py), in three passes over tasks:
//   1. state   per image and chunk of tokens: S[e][d] = sum_n relu(k[n][e]) v[n][d] and z[e] = sum_n relu(k[n][e])
//   2. reduce  per image and head: the chunks' states are added, in order
//      (on AMX it is then rearranged: linear_attention_amx.cpp)
//   3. apply   per image and block of tokens: out[n][d] = (relu(q[n]) . S[:][d]) / (relu(q[n]) . z + eps)
//              (quantised, a block's rows are written to the cache first, and go to int8 from there)
// With qk-norm, a pass first takes the mean square of each of its tokens over all heads; weights are widened to float
// once.
//
// Layouts: q, k, v (B, N, H, D) with any strides but the last, so a packed QKV projection is read in place; out
// contiguous; states as linear_attention_cpu.h says. Everything is summed in float.
//
// Tiling: a task covers all heads of its tokens, because a token's heads lie side by side in memory: rows are read from
// front to back, and the norm finds its row in the cache. Within a task the kernels go through 32 tokens at a time,
// head by head: 32 tokens of one head are widened into a small buffer (L1), the head's state (4 KB at D = 32) passes
// through registers. All heads of an image are 290 KB of state at C = 2240: they stay in L2.
//
// The split depends on the shape alone (chunks of at least 128 tokens, at most 64 per call), never on the number of
// threads: the result has the same bytes on any number of them.
//
// Bytes: 4 B N H D elements (q, k, v read once, out written once), and 2 chunks B H (D + 1) D floats of state.
// FLOPs: 4 B N H D (D + 1). At D = 32 that is 16.5 per byte in bf16, 8.2 in fp32, where a core with AVX-512 does 5 to 20
// per byte of its memory bandwidth: the two bounds lie close together, so neither side may waste anything.
// Measured on one Zen 5 core (263 GFLOP/s in fp32, twice that in bf16; 40 GB/s) at B = 2, N = 1024, C = 2240:
// bf16 2.8 ms (216 GFLOP/s, 13 GB/s), with qk-norm 3.6 ms; fp32 4.8 ms (127 GFLOP/s, 15 GB/s), with qk-norm 5.4 ms.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "common/cpu_features.h"
#include "common/threads.h"
#include "gemm/result_rows.h"
#include "linear_attention/linear_attention_cpu.h"

namespace sana {
namespace {

constexpr int64_t kMinChunk = 128, kMaxTasks = 64;
constexpr int64_t kBlock = 32;  // tokens of one apply task

constexpr const LinearAttentionKernels* kByIsa[kIsas] = {&linear_attention_portable, SANA_AVX2(&linear_attention_avx2),
                                                         nullptr, SANA_AVX512VNNI(&linear_attention_avx512vnni),
                                                         SANA_AVX512(&linear_attention_avx512),
                                                         SANA_AMX(&linear_attention_amx)};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, round_up(count * sizeof(float), 64))));
}

// (H * D) weights of any dtype as (H, pitch) floats, zero beyond D.
void widen(const LinearAttention& p, const void* weight, DType dtype, float* wide) {
  const int64_t pitch = state_pitch(p);
  for (int64_t h = 0; h < p.H; ++h) {
    std::fill_n(wide + h * pitch, pitch, 0.0f);
    load_row(at(weight, h * p.D, dtype), dtype, p.D, wide + h * pitch);
  }
}

}  // namespace

Status linear_attention_cpu(const LinearAttention& p, int threads) {
  if (const Status status = check(p); status != Status::ok) return status;
  const LinearAttentionKernels& kernels = choose(kByIsa);

  const int64_t per_image = std::max<int64_t>(1, kMaxTasks / p.B);
  const int64_t chunk = ceil_div(std::max(kMinChunk, ceil_div(p.N, per_image)), kBlock) * kBlock;
  const int64_t chunks = ceil_div(p.N, chunk), blocks = ceil_div(p.N, kBlock);
  const int64_t head_floats = head_state_floats(p), state_floats = p.H * head_floats;
  const int64_t weight_floats = p.H * state_pitch(p);

  const Floats memory = allocate(p.B * chunks * state_floats + 2 * weight_floats);
  if (memory == nullptr) return Status::out_of_memory;
  float* const states = memory.get();
  float* q_weight = states + p.B * chunks * state_floats;
  float* k_weight = q_weight + weight_floats;
  if (p.q_norm == nullptr) q_weight = nullptr; else widen(p, p.q_norm, p.q_norm_dtype, q_weight);
  if (p.k_norm == nullptr) k_weight = nullptr; else widen(p, p.k_norm, p.k_norm_dtype, k_weight);

  parallel_for(threads, p.B * chunks, [&](int64_t task) {
    const int64_t first = task % chunks * chunk;
    kernels.state(p, k_weight, task / chunks, first, std::min(first + chunk, p.N), states + task * state_floats);
  });
  if (chunks > 1 || kernels.finish != nullptr) {
    parallel_for(threads, p.B * p.H, [&](int64_t task) {
      float* sum = states + task / p.H * chunks * state_floats + task % p.H * head_floats;
      for (int64_t c = 1; c < chunks; ++c)
        for (int64_t i = 0; i < head_floats; ++i) sum[i] += sum[c * state_floats + i];
      if (kernels.finish != nullptr) kernels.finish(p, sum);
    });
  }
  const ResultRows result = {p.out, p.row_scale, p.H * p.D, p.dtype};
  std::atomic<bool> failed{false};
  parallel_for(threads, p.B * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * kBlock, last = std::min(first + kBlock, p.N);
    const bool written = result.write(b * p.N + first, last - first, [&](void* rows) {
      kernels.apply(p, q_weight, b, first, last, states + b * chunks * state_floats, rows);
    });
    if (!written) failed = true;
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace sana
