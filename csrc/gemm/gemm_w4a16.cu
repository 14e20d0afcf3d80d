// 16-bit activations times 4-bit weights for few tokens, on NVIDIA GPUs, sm_80 and newer: the text encoder.
//
// Algorithm (sana_kernels/gemm/int4_reference.py, sana_kernels/quant/formats.py):
//     sums[m][n] = sum over groups g of scale[n][g] * (sum over k in g of x[m][k] * weight[n][k])
// then the epilogue (gemm/epilogue.cuh). The whole numbers -7 ... 7 are exact in 16 bits, so they meet x on tensor
// cores as they are, and scales meet float sums: no dequantised weight is ever rounded.
//
// Layouts: x (M, K) half or bfloat16; weight (N, Kp / 2) bytes, row-major, low nibble first; scale (N, groups) floats.
//
// Tiling: a block owns 64 columns and 64 tokens, or 16 where there are no more; a warp 16 columns and all of the
// tokens, so that each weight is unpacked by one warp only. K goes through shared memory 64 at a time, three slabs
// ahead. Within these 64, a sum may run in any order: lane t of four takes k = 16 t ... 16 t + 15, which are 8
// neighbouring bytes of a weight row and 32 of x, instead of the 16 scattered pieces that mma's fragments name. So step
// s of four multiplies, as its k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9, the values 16 t + 4 s ... 16 t + 4 s + 3 of both.
//
// Bytes: N K / 2 of weights, and M K + M N elements. Multiply-adds: M N K. At M = 64, N = 9216, K = 2304: 12 MB, 2.8 us
// at 4.3 TB/s, and 1.4e9 multiply-adds, 5.7 us at 240e12 per second (60 % of what an H200 does, through mma.sync).
// Bound by the memory of the weights up to about 30 tokens, then by tensor cores: for hundreds of tokens, 16-bit
// weights are as fast.
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/gemm_cuda.h"
#include "gemm/tile.cuh"

namespace sana {
namespace {

constexpr int kK = 64;                // of a slab, and of a group or a part of it
constexpr int kPitchX = 2 * kK + 16;  // bytes of a row of x: eight rows' pieces of 16 bytes then meet different banks
constexpr int kPitchW = kK / 2;

// What differs between the two 16-bit types: the mma, and how a nibble becomes a number. OR-ed into the bits of 128
// (1024), n ^ 8 = value + 8 is the number 128 + value + 8, whose subtraction of 136 is exact.
struct Half {
  static constexpr uint32_t kBits = 0x64006400u;
  static __device__ uint32_t minus_bias(uint32_t pair) {
    const auto x = __hsub2(reinterpret_cast<const __half2&>(pair), __floats2half2_rn(1032, 1032));
    return reinterpret_cast<const uint32_t&>(x);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
  }
};
struct Bfloat16 {
  static constexpr uint32_t kBits = 0x43004300u;
  static __device__ uint32_t minus_bias(uint32_t pair) {
    const auto x = __hsub2(reinterpret_cast<const __nv_bfloat162&>(pair), __floats2bfloat162_rn(136, 136));
    return reinterpret_cast<const uint32_t&>(x);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
  }
};

// The two nibbles of byte `index` of `packed` as 16-bit numbers, the low nibble in the low half.
template <class Type>
__device__ uint32_t unpack(uint32_t packed, int index) {
  const uint32_t byte = packed >> (8 * index);
  const uint32_t pair = (byte & 0x0fu) | (byte & 0xf0u) << 12;
  return Type::minus_bias((pair ^ 0x00080008u) | Type::kBits);
}

struct Problem {
  const uint8_t* x;
  Int4Rows weight;
  int K, slabs, slabs_per_group;
  Epilogue epilogue;
};

template <class Type, class T>
__global__ void __launch_bounds__(T::kThreads, 1) gemm_w4a16_kernel(Problem p) {
  constexpr int kX = T::BM * kPitchX, kW = T::BN * kPitchW, kStage = kX + kW + T::BN * int(sizeof(float));
  auto* shared = dynamic_shared<uint8_t>();
  const int64_t m = int64_t{blockIdx.x} * T::BM, n = int64_t{blockIdx.y} * T::BN;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = threadIdx.x / 32 * T::WN;

  const auto fetch = [&](int slab) {
    if (slab < p.slabs) {
      uint8_t* to = shared + slab % T::Stages * kStage;
#pragma unroll 1
      for (int i = threadIdx.x; i < T::BM * 8; i += T::kThreads) {
        const int row = i / 8, k = slab * kK + i % 8 * 8;
        const bool inside = m + row < p.epilogue.M && k < p.K;
        cp_async<16>(to + row * kPitchX + i % 8 * 16, inside ? p.x + ((m + row) * p.K + k) * 2 : p.x, inside ? 16 : 0);
      }
      const auto* values = static_cast<const uint8_t*>(p.weight.values);
      for (int i = threadIdx.x; i < T::BN * 2; i += T::kThreads) {
        const int row = i / 2;
        const bool inside = n + row < p.epilogue.N;
        const int64_t at = ((n + row) * p.slabs + slab) * kPitchW + i % 2 * 16;
        cp_async<16>(to + kX + row * kPitchW + i % 2 * 16, inside ? values + at : values, inside ? 16 : 0);
      }
      for (int row = threadIdx.x; row < T::BN; row += T::kThreads) {
        const bool inside = n + row < p.epilogue.N;
        const int64_t at = (n + row) * p.weight.groups + slab / p.slabs_per_group;
        cp_async<4>(to + kX + kW + row * 4, inside ? p.weight.scale + at : p.weight.scale, inside ? 4 : 0);
      }
    }
    cp_async_commit();
  };

  Sums<T, float> sums = {};
  for (int slab = 0; slab < T::Stages - 1; ++slab) fetch(slab);
  for (int slab = 0; slab < p.slabs; ++slab) {
    cp_async_wait<T::Stages - 2>();
    __syncthreads();  // this slab is there for all warps, and the one before it has been read by all
    fetch(slab + T::Stages - 1);
    const uint8_t* xs = shared + slab % T::Stages * kStage;
    const uint8_t* ws = xs + kX;
    const auto* scales = reinterpret_cast<const float*>(ws + kW);
    uint32_t fw[T::NT][4][2];  // of step s
#pragma unroll
    for (int j = 0; j < T::NT; ++j) {
      const uint2 packed = *reinterpret_cast<const uint2*>(ws + (column + j * 8 + g) * kPitchW + t * 8);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        for (int r = 0; r < 2; ++r) fw[j][s][r] = unpack<Type>(s < 2 ? packed.x : packed.y, s % 2 * 2 + r);
      }
    }
#pragma unroll
    for (int i = 0; i < T::MT; ++i) {
      uint4 rows[2][2];  // of rows g and g + 8: the first 8 and the last 8 of 16 values
      for (int r = 0; r < 2; ++r) {
        const auto* from = reinterpret_cast<const uint4*>(xs + (i * 16 + g + r * 8) * kPitchX + t * 32);
        rows[r][0] = from[0];
        rows[r][1] = from[1];
      }
      float group[T::NT][4] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint4 &top = rows[0][s / 2], &bottom = rows[1][s / 2];
        const uint32_t fx[4] = {s % 2 == 0 ? top.x : top.z, s % 2 == 0 ? bottom.x : bottom.z,
                                s % 2 == 0 ? top.y : top.w, s % 2 == 0 ? bottom.y : bottom.w};
        for (int j = 0; j < T::NT; ++j) Type::mma(group[j], fx, fw[j][s]);
      }
      for (int j = 0; j < T::NT; ++j) {
        for (int r = 0; r < 4; ++r) sums[i][j][r] += group[j][r] * scales[column + j * 8 + t * 2 + r % 2];
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the epilogue overwrites the slabs
  finish<T>(p.epilogue, sums, m, n, shared);
}

template <class Type, class T>
cudaError_t run(const GemmW4A16& args, cudaStream_t stream) {
  const Epilogue& e = args.epilogue;
  const int slabs = static_cast<int>(args.weight.groups * (args.group / kK));
  const Problem p = {static_cast<const uint8_t*>(args.x),
                     args.weight,
                     static_cast<int>(args.K),
                     slabs,
                     static_cast<int>(args.group / kK),
                     e};
  const dim3 grid(static_cast<unsigned>(ceil_div(e.M, T::BM)), static_cast<unsigned>(ceil_div(e.N, T::BN)));
  const size_t shared = T::Stages * (T::BM * kPitchX + T::BN * kPitchW + T::BN * sizeof(float));  // 46 KB, or 18
  return launch_kernel<gemm_w4a16_kernel<Type, T>>(grid, dim3(T::kThreads), shared, stream, p);
}

template <class Type>
cudaError_t run(const GemmW4A16& p, cudaStream_t stream) {
  return p.epilogue.M <= 16 ? run<Type, Tile<1, 4, 16, 16>>(p, stream) : run<Type, Tile<1, 4, 64, 16>>(p, stream);
}

}  // namespace

Status gemm_w4a16_cuda(const GemmW4A16& p, void* stream) {
  const Epilogue& e = p.epilogue;
  if (e.M < 1 || e.N < 1 || e.image < 1 || p.K < 1 || p.K % 8 != 0) return Status::bad_shape;
  if (p.group % kK != 0 || p.weight.groups != ceil_div(p.K, p.group)) return Status::bad_shape;
  if (!valid(e.dtype) || p.dtype == DType::f32) return Status::bad_dtype;
  const auto on = static_cast<cudaStream_t>(stream);
  return cuda_status(p.dtype == DType::f16 ? run<Half>(p, on) : run<Bfloat16>(p, on));
}

}  // namespace sana
