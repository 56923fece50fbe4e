// What the kernels share. All sources are one translation unit, put together by gpu/kernels.rs: this file, then the others once
// for each element type T of tensors, f32 and bf16; attention has a file for each type. No header is included, so that NVRTC needs
// no directory of headers, and the simulator (gpu/simulator/) can compile the same text as C++.
//
// Rules that all kernels keep:
// - Any number of threads in a block that is a multiple of 32, up to 1024 (attention: exactly its THREADS).
// - Sums have a fixed order, which depends on shapes alone; no atomics. The same launch gives the same bits.
// - Arithmetic in f32 without fast-math, whatever T is: values are widened as they are loaded and rounded as they are stored, once.
//   What is no tensor's element but a statistic of a row (1/rms, log-sum-exp) is stored in f32. Sums that leave the device as one
//   number are taken in f64. The exception is attention in bf16: it rounds P and dS for the tensor cores and uses exp2_approx.
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
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
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

// ---- instructions of compute capability 8.0; a kernel that comes to one on an older GPU fails

// Two bf16 in one register, the first in the lower half, as in memory.
__device__ u32 bf16_pair(float first, float second) {
    u32 pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
    Bf16 x, y;
    x = first, y = second;
    pair = x.bits | (u32)y.bits << 16;
#endif
    return pair;
}

__device__ float bf16_first(u32 pair) { return __int_as_float(pair << 16); }
__device__ float bf16_second(u32 pair) { return __int_as_float(pair & 0xffff0000u); }

#ifndef SIMULATOR // which has its own

#if __CUDA_ARCH__ >= 800
#define PTX(...) asm volatile(__VA_ARGS__)
#else
#define PTX(...) __trap()
#endif

// 2ˣ to two units in the last place, 0 below 2⁻¹²⁶.
__device__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies N bytes (4, or 16 between addresses that are multiples of 16) to shared memory, or zeros if `there` is false. Done after
// this thread has waited; for the block's other threads, after a barrier behind that.
template <u32 N> __device__ void copy_async(void* to, const void* from, bool there) {
    const u32 address = __cvta_generic_to_shared(to), bytes = there ? N : 0;
    if (N == 16) { // past the first-level cache
        PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    } else {
        PTX("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(N), "r"(bytes) : "memory");
    }
}

__device__ void wait_for_copies() { PTX("cp.async.wait_all;" ::: "memory"); }

// Four 8×8 matrices of bf16 in shared memory. Lane 8·i + j names row j of matrix i, 16 bytes; lane 4·g + t gets of each matrix
// columns 2t and 2t + 1 of row g; transposed, rows 2t and 2t + 1 of column g.
__device__ void read_blocks(u32 (&x)[4], const void* row) {
    const u32 address = __cvta_generic_to_shared(row);
    PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "r"(address)
        : "memory");
}
__device__ void read_blocks_transposed(u32 (&x)[4], const void* row) {
    const u32 address = __cvta_generic_to_shared(row);
    PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "r"(address)
        : "memory");
}

// sum += A·B on the tensor cores, bf16 with f32 sums, A [16, 16], B [16, 8]. Lane 4·g + t has, of A, columns 2t and 2t + 1 of row g,
// of row g + 8, then the same eight columns further; of B, rows 2t and 2t + 1 of column g, then eight rows further; of the sum,
// columns 2t and 2t + 1 of row g, then of row g + 8.
__device__ void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
}

#endif
