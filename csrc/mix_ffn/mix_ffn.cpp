// SANA's Mix-FFN on CPUs, band by band.
//
// Algorithm (sana_kernels/mix_ffn/reference.py), for bands of a few image rows:
//     h = SiLU(x expand^T + bias)       gemm            C -> 2F, bf16
//     u = depthwise_glu(h)              depthwise_glu   2F -> F, bf16 or int8 with one scale per token
//     out = epilogue(u project^T)       gemm            F -> C
// At F = 2.5 C, h is five times as wide as x. In bands it never leaves the last cache: at C = 1152, 512 tokens of h are
// 5.9 MB, while all of it, for two images of 1024 px, are 24 MB to be written and read again.
//
// Bands: row i of u needs rows i - 1 to i + 1 of h, so u runs one row behind h, and two bands of h take turns in two
// buffers: when band k is there, all rows of u up to the last but one of band k can be computed.
//
// Every step is spread over all threads and ends before the next begins. The weights stream from the last cache once per
// band, so a band has about 512 tokens, enough work per byte of weights, or more where that is not enough for all threads.
// Images smaller than that are done some at a time.
//
// FLOPs: 2 N (C 2F + 18 F + F C). Bytes: x, residual, out, and the weights once per band. Bound: the multiply unit.
#include "mix_ffn/mix_ffn.h"

#include <algorithm>
#include <atomic>

#include "common/integers.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "gemm/gemm.h"
#include "gemm/quantize.h"
#include "mix_ffn/depthwise_glu.h"

namespace sana {
namespace {

constexpr int64_t kTokens = 512, kTokensPerThread = 32;  // of a band, about
constexpr DType kMiddle = DType::bf16;
// Elements between two tokens of h. A power of 2 of bytes from token to token (F = 4096 in the DC-AE) would put all that a
// channel's convolution reads in a few sets of the caches.
constexpr int64_t kGap = 32;

int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

// The rows of one image, or of some whose band is all of them, and where their bands of h and u lie.
class Bands {
 public:
  Bands(const MixFfn& p, int threads) : p_(p), threads_(threads) {
    const int64_t most = std::max(kTokens, kTokensPerThread * threads);
    rows_ = std::min(std::max<int64_t>(2, most / p.width), std::max<int64_t>(2, p.height));
    images_ = rows_ < p.height ? 1 : std::clamp<int64_t>(most / (p.height * p.width), 1, p.B);
    const int64_t h_row = p.width * pitch() * element_size(kMiddle);
    u_pitch_ = is_int8() ? quantized_pitch(p.F) : p.F * element_size(kMiddle);
    const int64_t filter = aligned(depthwise_filter_floats(p.F) * sizeof(float)), h = aligned(images_ * rows_ * h_row);
    const int64_t tokens = images_ * (rows_ + 1) * p.width, u = aligned(tokens * u_pitch_);
    static thread_local Scratch scratch;
    char* memory = scratch.reserve(filter + 2 * h + u + tokens * sizeof(float));
    if (memory == nullptr) return;
    h_[0] = memory + filter;
    h_[1] = h_[0] + h;
    u_ = h_[1] + h;
    u_scale_ = reinterpret_cast<float*>(u_ + u);
    DepthwiseGlu middle{};
    middle.weight = p.depthwise_weight;
    middle.weight_dtype = p.depthwise_weight_dtype;
    middle.bias = p.depthwise_bias;
    middle.bias_dtype = p.depthwise_bias_dtype;
    middle.dtype = kMiddle;
    middle.F = p.F;
    filter_ = pack_depthwise(middle, reinterpret_cast<float*>(memory), threads);
  }

  Status run() {
    if (filter_.taps == nullptr) return Status::out_of_memory;
    for (int64_t b = 0; b < p_.B; b += images_) {
      const int64_t images = std::min(images_, p_.B - b);
      for (int64_t first = 0; first < p_.height; first += rows_) {
        const int64_t last = std::min(first + rows_, p_.height);
        const int64_t u_first = first == 0 ? 0 : first - 1, u_last = last == p_.height ? last : last - 1;
        Status status = expand(b, images, first, last);
        if (status == Status::ok) status = glu(images, u_first, u_last);
        if (status == Status::ok) status = project(b, images, u_first, u_last);
        if (status != Status::ok) return status;
      }
    }
    return Status::ok;
  }

 private:
  bool is_int8() const { return p_.x_scale != nullptr; }
  int64_t pitch() const { return 2 * p_.F + kGap; }

  // Row i of h of the image-th of them, or null beyond it.
  char* h_row(int64_t image, int64_t i) const {
    if (i < 0 || i >= p_.height) return nullptr;
    return h_[i / rows_ % 2] + (image * p_.height + i % rows_) * p_.width * pitch() * element_size(kMiddle);
  }

  Status expand(int64_t b, int64_t images, int64_t first, int64_t last) const {
    const int64_t token = (b * p_.height + first) * p_.width;
    Gemm g{};
    g.x = static_cast<const char*>(p_.x) + token * p_.x_stride;
    g.x_stride = p_.x_stride;
    g.x_scale = is_int8() ? p_.x_scale + token : nullptr;
    g.weight = p_.expand;
    g.weight_scale = p_.expand_scale;
    g.bias = p_.expand_bias;
    g.out = h_row(0, first);
    g.out_stride = pitch();
    g.M = images * (last - first) * p_.width;
    g.N = 2 * p_.F;
    g.K = is_int8() ? quantized_pitch(p_.C) : p_.C;
    g.dtype = kMiddle;
    g.silu = true;
    return gemm_cpu(g, threads_);
  }

  Status glu(int64_t images, int64_t first, int64_t last) const {
    std::atomic<bool> failed{false};
    parallel_for(threads_, images * (last - first), [&](int64_t i) {
      static thread_local Scratch scratch;
      float* buffer = reinterpret_cast<float*>(scratch.reserve(depthwise_glu_scratch(p_.F) * sizeof(float)));
      if (buffer == nullptr) {
        failed = true;
        return;
      }
      const int64_t image = i / (last - first), row = first + i % (last - first);
      depthwise_glu_row({{h_row(image, row - 1), h_row(image, row), h_row(image, row + 1)}, pitch(), filter_,
                         u_ + i * p_.width * u_pitch_, is_int8() ? u_scale_ + i * p_.width : nullptr, buffer, p_.width,
                         p_.F, kMiddle});
    });
    return failed ? Status::out_of_memory : Status::ok;
  }

  Status project(int64_t b, int64_t images, int64_t first, int64_t last) const {
    const int64_t token = (b * p_.height + first) * p_.width;
    Gemm g{};
    g.x = u_;
    g.x_stride = u_pitch_;
    g.x_scale = is_int8() ? u_scale_ : nullptr;
    g.weight = p_.project;
    g.weight_scale = p_.project_scale;
    g.gate = p_.gate == nullptr ? nullptr : p_.gate + b * p_.C;
    g.residual = p_.residual == nullptr ? nullptr : at(p_.residual, token * p_.C, p_.dtype);
    g.out = at(p_.out, token * p_.C, p_.dtype);
    g.image = (last - first) * p_.width;
    g.M = images * g.image;
    g.N = g.out_stride = p_.C;
    g.K = is_int8() ? quantized_pitch(p_.F) : p_.F;
    g.dtype = p_.dtype;
    return gemm_cpu(g, threads_);
  }

  const MixFfn& p_;
  const int threads_;
  int64_t rows_, images_, u_pitch_;
  DepthwiseFilter filter_ = {};
  char* h_[2] = {};
  char* u_ = nullptr;
  float* u_scale_ = nullptr;
};

}  // namespace

Status mix_ffn_cpu(const MixFfn& p, int threads) {
  if (p.B < 1 || p.height < 1 || p.width < 1 || p.C < 1 || p.F < 1) return Status::bad_shape;
  return Bands(p, threads).run();
}

}  // namespace sana
