// Small kernels for tests/test_emulator.py: every function that csrc/emulator offers to kernels, and the classic
// mistakes. They compile with nvcc, too. Each entry point takes addresses of device memory and returns a cudaError_t.
#include "common/cuda_common.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

using namespace sana;

namespace {

// ---- Blocks, threads and shared memory

// out[global thread] = what the thread sees of the launch, as one number.
__global__ void indices_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] =
      (blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x + 1000 * (threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x);
}

// Reverses each row of 128.
__global__ void __launch_bounds__(128) reverse_kernel(const float* in, float* out) {
  __shared__ float row[128];
  row[threadIdx.x] = in[blockIdx.x * 128 + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * 128 + threadIdx.x] = row[127 - threadIdx.x];
}

// Sums each column of a (rows, n) matrix in tiles of one row: each barrier guards against another hazard.
__global__ void column_sums_kernel(const float* in, float* out, int rows, int n) {
  float* tile = dynamic_shared<float>();
  float sum = 0;
  for (int r = 0; r < rows; ++r) {
    tile[threadIdx.x] = in[r * n + threadIdx.x];
    __syncthreads();  // before reading
    sum += tile[(threadIdx.x + 1) % n];
    __syncthreads();  // before overwriting
  }
  out[(threadIdx.x + 1) % n] = sum;
}

// Adds up 32 values through shared memory within one warp: a butterfly, after which every lane has the sum.
__global__ void tree_sum_kernel(const float* in, float* out) {
  __shared__ float value[32];
  value[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  for (int half = 16; half > 0; half /= 2) {
    const float other = value[threadIdx.x ^ half];
    __syncwarp();  // before overwriting
    value[threadIdx.x] += other;
    __syncwarp();  // before reading
  }
  out[threadIdx.x] = value[threadIdx.x];
}

// ---- Warp operations: row i of `out` holds the results of operation i.
__global__ void warp_kernel(const int* in, int* out) {
  const int lane = threadIdx.x, x = in[lane];
  const unsigned all = 0xffffffffu;
  int i = 0;
  auto put = [&](int value) { out[32 * i++ + lane] = value; };
  put(__shfl_sync(all, x, (lane * 7 + 3) % 32));
  put(__shfl_sync(all, x, 2, 8));
  put(__shfl_xor_sync(all, x, 5));
  put(__shfl_up_sync(all, x, 3));
  put(__shfl_up_sync(all, x, 3, 16));
  put(__shfl_down_sync(all, x, 4));
  put(__shfl_down_sync(all, x, 4, 8));
  put(__reduce_add_sync(all, x));
  put(__reduce_min_sync(all, x));
  put(__reduce_max_sync(all, x));
  put(static_cast<int>(__reduce_max_sync(all, static_cast<unsigned>(x))));
  put(static_cast<int>(__ballot_sync(all, x > 0)));
  put(lane < 12 ? __reduce_add_sync(0x00000fffu, x) : __reduce_add_sync(0xfffff000u, x));
  const double wide = __shfl_xor_sync(all, x * 0x1p40, 1);
  put(static_cast<int>(wide * 0x1p-40));
}

// out: [count, sum, min, max, last exchanged (-1: by nobody), swapped]
__global__ void atomics_kernel(const int* in, int* out, long long* wide) {
  const int x = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&out[0], 1);
  atomicAdd(&out[1], x);
  atomicMin(&out[2], x);
  atomicMax(&out[3], x);
  atomicExch(&out[4], 7);
  atomicCAS(&out[5], 0, 9);
  atomicMax(wide, static_cast<long long>(x) << 32);
}

// ---- Intrinsics: out[i] for the pair (a, b)
__global__ void intrinsics_kernel(const float* a, const float* b, float* out, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  const float x = __ldg(a + i), y = __ldg(b + i);
  const float values[] = {min(x, y),
                          max(x, y),
                          rsqrtf(x),
                          __expf(x),
                          __fdividef(x, y),
                          static_cast<float>(__float2int_rn(x)),
                          __int_as_float(__float_as_int(x) ^ 0x80000000),
                          __uint_as_float(__float_as_uint(x) & 0x7fffffffu),
                          static_cast<float>(min(i - 5, 3)),
                          static_cast<float>(max(i, 3u))};
  for (int k = 0; k < 10; ++k) out[k * n + i] = values[k];
}

__global__ void byte_perm_kernel(const unsigned* in, unsigned* out) {
  const unsigned* p = in + 3 * threadIdx.x;
  out[threadIdx.x] = __byte_perm(p[0], p[1], p[2]);
}

// ---- PTX: registers of every lane from memory, one operation, registers to memory

#define MMA(Name, function, Sum)                                                                                   \
  struct Name {                                                                                                    \
    static __device__ void run(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { function(d, a, b); } \
  };
MMA(F16, mma_m16n8k16_f16, float)
MMA(Bf16, mma_m16n8k16_bf16, float)
MMA(S8, mma_m16n8k32_s8, int32_t)
MMA(S4, mma_m16n8k64_s4, int32_t)

template <class Mma, class Sum>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, Sum* d) {
  uint32_t fa[4], fb[2];
  Sum fd[4];
  for (int r = 0; r < 4; ++r) fa[r] = a[4 * threadIdx.x + r];
  for (int r = 0; r < 2; ++r) fb[r] = b[2 * threadIdx.x + r];
  for (int r = 0; r < 4; ++r) fd[r] = d[4 * threadIdx.x + r];
  Mma::run(fd, fa, fb);
  for (int r = 0; r < 4; ++r) d[4 * threadIdx.x + r] = fd[r];
}

// in: Count 8 x 8 matrices of uint16, one after the other; out: the registers of every lane.
template <int Count, bool Transpose>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  __shared__ __align__(16) uint16_t matrices[4][8][8];
  for (int i = threadIdx.x; i < Count * 64; i += 32) (&matrices[0][0][0])[i] = in[i];
  __syncthreads();
  uint32_t r[Count];
  const uint16_t* row = matrices[threadIdx.x / 8 % Count][threadIdx.x % 8];
  if constexpr (Transpose) {
    ldmatrix_trans(r, row);
  } else {
    ldmatrix(r, row);
  }
  for (int m = 0; m < Count; ++m) out[Count * threadIdx.x + m] = r[m];
}

// Thread i copies valid[i] of Bytes bytes.
template <int Bytes>
__global__ void copy_kernel(const char* in, const int* valid, char* out) {
  __shared__ __align__(16) char buffer[32 * Bytes];
  const int at = threadIdx.x * Bytes;
  cp_async<Bytes>(buffer + at, in + at, valid[threadIdx.x]);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < Bytes; ++i) out[at + i] = buffer[at + i];
}

// Reverses rows of 32 values through three stages of asynchronous copies.
__global__ void pipeline_kernel(const float* in, float* out, int rows) {
  __shared__ __align__(16) float stage[3][32];
  auto fetch = [&](int row) {
    if (row < rows && threadIdx.x < 8) cp_async<16>(&stage[row % 3][4 * threadIdx.x], in + 32 * row + 4 * threadIdx.x);
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int row = 0; row < rows; ++row) {
    cp_async_wait<1>();
    __syncthreads();  // all copies of this row have landed, and nobody reads the row before it any more
    fetch(row + 2);
    out[32 * row + threadIdx.x] = stage[row % 3][31 - threadIdx.x];
  }
}

// C = A * B^T for int8, by one warp: A (16, K), B (8, K), C (16, 8); K a multiple of 32.
__global__ void gemm_kernel(const int8_t* A, const int8_t* B, int* C, int K) {
  __shared__ __align__(16) int8_t a[16][48], b[8][48];  // 48: rows start at multiples of 16 and in different banks
  int32_t d[4] = {};
  for (int k = 0; k < K; k += 32) {
    cp_async<16>(&a[threadIdx.x / 2][threadIdx.x % 2 * 16], A + threadIdx.x / 2 * K + k + threadIdx.x % 2 * 16);
    if (threadIdx.x < 16) {
      cp_async<16>(&b[threadIdx.x / 2][threadIdx.x % 2 * 16], B + threadIdx.x / 2 * K + k + threadIdx.x % 2 * 16);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[2];
    ldmatrix(fa, &a[threadIdx.x % 16][threadIdx.x / 16 * 16]);
    ldmatrix(fb, &b[threadIdx.x % 8][threadIdx.x / 8 % 2 * 16]);
    mma_m16n8k32_s8(d, fa, fb);
  }
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int r = 0; r < 4; ++r) C[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = d[r];
}

// ---- Mistakes

__global__ void mistake_kernel(float* data, int n, int mistake) {
  __shared__ float shared[64];
  const int i = threadIdx.x;
  shared[i] = 0;
  if (mistake == 0 && i < 32) __syncthreads();  // the other warp never comes
  if (mistake == 1) {                           // two barriers that are not the same
    if (i % 2 == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (mistake == 2) {
    if (i == 5) return;
    __syncthreads();
  }
  if (mistake == 3 && i != 3) shared[i] = __shfl_xor_sync(0xffffffffu, shared[i], 1);
  if (mistake == 4) shared[i] = __shfl_sync(0x0000ffffu << (i % 32 / 16 * 16), shared[i], 31 - i % 32);
  if (mistake == 5) __syncwarp(0xfffffffeu);
  if (mistake == 6 && i == 9) data[n] = 1;
  if (mistake == 7 && i == 9) shared[i] = data[n + 3];
  if (mistake == 8 && i == 9) *reinterpret_cast<float4*>(data + 1) = make_float4(1, 2, 3, 4);
  if (mistake == 9 && i == 9) dynamic_shared<float>()[64] = 1;
  if (mistake == 10 && i == 9) shared[i] = i / (n - 8);
  if (mistake == 11 && i == 9) cp_async<16>(data, data);
  if (mistake == 12 && i == 9) cp_async<16>(&shared[1], data);
  if (mistake == 13 && i == 9) data[-1] = 1;
  if (mistake == 14 && i == 9) shared[i + 8 * n] = 1;
  if (mistake == 15 && i == 9) shared[i] = 1 << (4 * n);
  __syncwarp();
  data[i % n] = shared[i];
}

}  // namespace

extern "C" {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int indices(int* out) { return launch_kernel<indices_kernel>(dim3(2, 3, 2), dim3(3, 2, 6), 0, nullptr, out); }
int reverse(const float* in, float* out, int rows) {
  return launch_kernel<reverse_kernel>(rows, 128, 0, nullptr, in, out);
}
int column_sums(const float* in, float* out, int rows, int n) {
  return launch_kernel<column_sums_kernel>(1, n, n * sizeof(float), nullptr, in, out, rows, n);
}
int tree_sum(const float* in, float* out) { return launch_kernel<tree_sum_kernel>(1, 32, 0, nullptr, in, out); }
int warp(const int* in, int* out) { return launch_kernel<warp_kernel>(1, 32, 0, nullptr, in, out); }
int atomics(const int* in, int* out, long long* wide) {
  return launch_kernel<atomics_kernel>(4, 64, 0, nullptr, in, out, wide);
}
int intrinsics(const float* a, const float* b, float* out, int n) {
  return launch_kernel<intrinsics_kernel>(1, 32, 0, nullptr, a, b, out, n);
}
int byte_perm(const unsigned* in, unsigned* out) { return launch_kernel<byte_perm_kernel>(1, 32, 0, nullptr, in, out); }

int mma_f16(const uint32_t* a, const uint32_t* b, float* d) {
  return launch_kernel<mma_kernel<F16, float>>(1, 32, 0, nullptr, a, b, d);
}
int mma_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  return launch_kernel<mma_kernel<Bf16, float>>(1, 32, 0, nullptr, a, b, d);
}
int mma_s8(const uint32_t* a, const uint32_t* b, int* d) {
  return launch_kernel<mma_kernel<S8, int32_t>>(1, 32, 0, nullptr, a, b, d);
}
int mma_s4(const uint32_t* a, const uint32_t* b, int* d) {
  return launch_kernel<mma_kernel<S4, int32_t>>(1, 32, 0, nullptr, a, b, d);
}
int ldmatrix_x2(const uint16_t* in, uint32_t* out) {
  return launch_kernel<ldmatrix_kernel<2, false>>(1, 32, 0, nullptr, in, out);
}
int ldmatrix_x4(const uint16_t* in, uint32_t* out) {
  return launch_kernel<ldmatrix_kernel<4, false>>(1, 32, 0, nullptr, in, out);
}
int ldmatrix_x2_trans(const uint16_t* in, uint32_t* out) {
  return launch_kernel<ldmatrix_kernel<2, true>>(1, 32, 0, nullptr, in, out);
}
int ldmatrix_x4_trans(const uint16_t* in, uint32_t* out) {
  return launch_kernel<ldmatrix_kernel<4, true>>(1, 32, 0, nullptr, in, out);
}
int copy_4(const char* in, const int* valid, char* out) {
  return launch_kernel<copy_kernel<4>>(1, 32, 0, nullptr, in, valid, out);
}
int copy_8(const char* in, const int* valid, char* out) {
  return launch_kernel<copy_kernel<8>>(1, 32, 0, nullptr, in, valid, out);
}
int copy_16(const char* in, const int* valid, char* out) {
  return launch_kernel<copy_kernel<16>>(1, 32, 0, nullptr, in, valid, out);
}
int pipeline(const float* in, float* out, int rows) {
  return launch_kernel<pipeline_kernel>(1, 32, 0, nullptr, in, out, rows);
}
int gemm(const int8_t* A, const int8_t* B, int* C, int K) {
  return launch_kernel<gemm_kernel>(1, 32, 0, nullptr, A, B, C, K);
}

int mistake(float* data, int n, int which) {
  return launch_kernel<mistake_kernel>(1, 64, 64 * sizeof(float), nullptr, data, n, which);
}
int launch_of(int threads, int blocks, int shared) {
  float* none = nullptr;
  return launch_kernel<mistake_kernel>(blocks, threads, shared, nullptr, none, 1, -1);
}

}  // extern "C"
