// What the kernels share. All sources are one translation unit, in the order of gpu/kernels.rs; no header is included, so that
// NVRTC needs no directory of headers, and the simulator (gpu/simulator/) can compile the same text as C++.
//
// Rules that all kernels keep:
// - Any number of threads in a block that is a multiple of 32, up to 1024 (attention: exactly its THREADS).
// - Sums have a fixed order, which depends on shapes alone; no atomics. The same launch gives the same bits.
// - Arithmetic in f32 without fast-math; sums that leave the device as one number are taken in f64.
// Letters: n rows, d columns of a tensor read as rows of its last axis; dy gradient of y.

typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL extern "C" __global__ void
#define INFINITE __int_as_float(0x7f800000)
#define WARP 32u
#define ALL_LANES 0xffffffffu

#ifndef SIMULATOR
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

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
