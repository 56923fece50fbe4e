// What the kernels share. All sources are one translation unit, put together by gpu/kernels.rs: this file, then the others once
// for each element type T of tensors, f32 and bf16. No header is included, so that NVRTC needs no directory of headers, and the
// simulator (gpu/simulator/) can compile the same text as C++.
//
// Rules that all kernels keep:
// - Any number of threads in a block that is a multiple of 32, up to 1024 (attention: exactly its THREADS).
// - Sums have a fixed order, which depends on shapes alone; no atomics. The same launch gives the same bits.
// - Arithmetic in f32 without fast-math, whatever T is: values are widened as they are loaded and rounded as they are stored, once.
//   What is no tensor's element but a statistic of a row (1/rms, log-sum-exp) is stored in f32. Sums that leave the device as one
//   number are taken in f64.
// Letters: n rows, d columns of a tensor read as rows of its last axis; dy gradient of y.

typedef unsigned int u32;
typedef unsigned long long u64;

// KERNEL(fill)(arguments) defines fill_f32 or fill_bf16; a macro of its own, for ELEMENT to be replaced before it is pasted.
#define PASTE(name, element) name##_##element
#define NAME(name, element) PASTE(name, element)
#define KERNEL(name) extern "C" __global__ void NAME(name, ELEMENT)
#define INFINITE __int_as_float(0x7f800000)
#define WARP 32u
#define ALL_LANES 0xffffffffu

#ifndef SIMULATOR
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

// bf16: the upper half of an f32. Reads as a float, and takes one, rounded to nearest, ties to even; a copy is one of bits.
struct Bf16 {
    unsigned short bits;

    __device__ operator float() const { return __int_as_float(bits << 16); }

    __device__ void operator=(float x) {
#if __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else // the same by hand
        const u32 whole = __float_as_int(x);
        bits = x == x ? (whole + 0x7fffu + (whole >> 16 & 1u)) >> 16 : 0x7fffu;
#endif
    }
};

// i over [0, n): each thread takes every so many elements, whatever the grid.
#define FOR_EACH(i, n) \
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (u64)gridDim.x * blockDim.x)

// c over the columns of this block's row.
#define FOR_COLUMNS(c, d) for (u32 c = threadIdx.x; c < (d); c += blockDim.x)

template <class T> __device__ T warp_sum(T v) {
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(ALL_LANES, v, lanes);
    return v;
}

__device__ float warp_max(float v) {
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, lanes));
    return v;
}

// The sum over the block, which every thread receives.
template <class T> __device__ T block_sum(T v) {
    __shared__ T part[WARP];
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = v;
    __syncthreads();
    v = 0;
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) v += part[warp];
    __syncthreads(); // the next sum writes `part` again
    return v;
}

// As block_sum; NaN is passed over (it comes back through the exponentials).
__device__ float block_max(float v) {
    __shared__ float part[WARP];
    v = warp_max(v);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = v;
    __syncthreads();
    v = part[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; warp++) v = fmaxf(v, part[warp]);
    __syncthreads();
    return v;
}
