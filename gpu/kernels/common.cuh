// What the kernels share. All sources are one translation unit, put together by gpu/kernels.rs: this file, then the others once
// for each element type T of tensors, f32 and bf16; attention has a file for each type. No header is included, so that NVRTC needs
// no directory of headers, and the simulator (gpu/simulator/) can compile the same text as C++.
//
// Rules that all kernels keep:
// - Any number of threads in a block that is a multiple of 32, up to 256 or to what KERNEL_FOR says (attention: exactly THREADS).
// - Memory is read and written 16 bytes at a time where rows are whole multiples of that. Every tensor begins at an allocation,
//   aligned to 256 bytes, so it depends on shapes alone which thread has which elements.
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
#define KERNEL_FOR(threads, name) extern "C" __global__ void __launch_bounds__(threads) NAME(name, ELEMENT)
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

// ---- several elements at a time

// W neighbouring elements in the words that they have in memory: one access for every 16 bytes.
template <class U, u32 W> struct alignas(W * sizeof(U) < 16 ? W * sizeof(U) : 16) Pack {
    u32 words[W * sizeof(U) / 4];

    __device__ float operator[](u32 j) const {
        if (sizeof(U) == 4) return __int_as_float(words[j]);
        return j % 2 ? bf16_second(words[j / 2]) : bf16_first(words[j / 2]);
    }
};

template <u32 W, class U> __device__ Pack<U, W> load(const U* x) { return *(const Pack<U, W>*)x; }

template <u32 W, class U> __device__ void store(U* y, const float* values) {
    Pack<U, W> pack;
    #pragma unroll
    for (u32 k = 0; k < W * sizeof(U) / 4; k++) {
        pack.words[k] = sizeof(U) == 4 ? __float_as_int(values[k]) : bf16_pair(values[2 * k], values[2 * k + 1]);
    }
    *(Pack<U, W>*)y = pack;
}

// What a thread has of a tensor while it computes: W elements that are read (`const U*`), or that are written (`U*`).
template <class U, u32 W> struct Read {
    Pack<U, W> pack;
    __device__ float operator[](u32 j) const { return pack[j]; }
    __device__ void done() const {}
};
template <class U, u32 W> struct Written {
    U* y;
    float values[W];
    __device__ float& operator[](u32 j) { return values[j]; }
    __device__ void done() const { store<W>(y, values); }
};
template <u32 W, class U> __device__ Read<U, W> neighbours(const U* x, u64 i) { return {load<W>(x + i)}; }
template <u32 W, class U> __device__ Written<U, W> neighbours(U* y, u64 i) { return {y + i, {}}; }

// The packs of a tensor that are on their way at a time where its elements are summed.
#define AHEAD 4u
template <class U, u32 W> struct Ahead {
    const U* x;
    Pack<U, W> packs[AHEAD];

    __device__ void start(u32 a, u64 i) { packs[a] = load<W>(x + i); }
};

// f(j, element j of each tensor) for all j < W, then what is written goes to memory.
template <u32 W, class F, class... E> __device__ void apply(F& f, E... elements) {
    #pragma unroll
    for (u32 j = 0; j < W; j++) f(j, elements[j]...);
    (elements.done(), ...);
}

__device__ constexpr u32 least(u32 a) { return a; }
template <class... N> __device__ constexpr u32 least(u32 a, u32 b, N... more) { return least(a < b ? a : b, more...); }

// i over [0, n): each thread takes every so many elements, whatever the grid.
#define FOR_EACH(i, n) \
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (u64)gridDim.x * blockDim.x)

// One of the threads that share some work.
struct Thread {
    u64 number, count;
};
__device__ Thread thread_of_grid() {
    return {(u64)blockIdx.x * blockDim.x + threadIdx.x, (u64)gridDim.x * blockDim.x};
}

// f(element i of each tensor) for all i < n. Tensors are `const U*`, whose elements f takes as float, or `U*`, whose elements f
// sets, taking them as auto&; one that is both read and written comes as both. Two packs of each are on their way at a time.
template <class F, class... P> __device__ void each(Thread thread, u64 n, F f, P*... p) {
    constexpr u32 W = least(16 / sizeof(P)...);
    const u64 packs = n / W;
    auto g = [&](u32, auto&&... elements) { f(elements...); };
    for (u64 k = thread.number; k < packs; k += 2 * thread.count) {
        auto first = [&](auto... a) {
            if (k + thread.count < packs) {
                auto second = [&](auto... b) { apply<W>(g, a...), apply<W>(g, b...); };
                second(neighbours<W>(p, (k + thread.count) * W)...);
            } else {
                apply<W>(g, a...);
            }
        };
        first(neighbours<W>(p, k * W)...);
    }
    for (u64 i = packs * W + thread.number; i < n; i += thread.count) f(p[i]...); // the tail
}
template <class F, class... P> __device__ void each(u64 n, F f, P*... p) { each(thread_of_grid(), n, f, p...); }

// ---- sums

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

// ---- rows

// A row of up to SHORT_ROW bytes has a warp, a longer one a block of up to ROW_THREADS threads. So has gpu/backend.rs.
#define SHORT_ROW 4096u
#define ROW_THREADS 512
#define ROW_KERNEL(name) KERNEL_FOR(ROW_THREADS, name)

// A row that is read once and then stays in registers, up to KEPT packs of it in each thread.
template <class U, u32 KEPT> struct KeptRow {
    static const u32 W = 16 / sizeof(U);
    const U* x;
    Pack<U, W> packs[KEPT];

    __device__ const U& operator[](u32 c) const { return x[c]; }
};
// Pack k of this thread, which is at column c.
template <bool KEEPS, u32 W, class U, u32 KEPT> __device__ Read<U, W> neighbours(const KeptRow<U, KEPT>& row, u32 k, u32 c) {
    if (KEEPS) return {row.packs[k]};
    return {load<W>(row.x + c)};
}
template <bool, u32 W, class U> __device__ auto neighbours(U* x, u32, u32 c) { return neighbours<W>(x, c); }

// This thread's part in a row of d columns of U: number lane, lane + threads, … of its packs if rows are whole packs (`wide`),
// otherwise of its columns.
template <class U, u32 KEPT = 8> struct Row {
    static const u32 W = 16 / sizeof(U);
    u64 number;
    u32 d, lane, threads;
    bool wide;

    __device__ Row(u32 d) : number(blockIdx.x), d(d), lane(threadIdx.x), threads(blockDim.x), wide(d % W == 0) {
        if (d <= SHORT_ROW / sizeof(U)) {
            number = number * (threads / WARP) + lane / WARP;
            lane %= WARP, threads = WARP;
        }
    }

    template <class P> __device__ P* of(P* x) const { return x + number * d; }

    __device__ KeptRow<U, KEPT> keep(const U* x) const {
        KeptRow<U, KEPT> kept;
        kept.x = x;
        #pragma unroll
        for (u32 k = 0; k < KEPT; k++) {
            const u32 c = (k * threads + lane) * W;
            if (wide && c < d) kept.packs[k] = load<W>(x + c);
        }
        return kept;
    }

    // f(c, element c of each row) for this thread's columns c. Rows as tensors in `each`, or KeptRow.
    template <class F, class... P> __device__ void columns(F f, const P&... p) const {
        if (!wide) {
            for (u32 c = lane; c < d; c += threads) f(c, p[c]...);
            return;
        }
        #pragma unroll
        for (u32 k = 0; k < KEPT; k++) pack<true>(f, k, p...);
        for (u32 k = KEPT; k * threads * W < d; k++) pack<false>(f, k, p...);
    }

    template <bool KEEPS, class F, class... P> __device__ void pack(F& f, u32 k, const P&... p) const {
        const u32 c = (k * threads + lane) * W;
        auto g = [&](u32 j, auto&&... elements) { f(c + j, elements...); };
        if (c < d) apply<W>(g, neighbours<KEEPS, W>(p, k, c)...);
    }

    __device__ void wait() const { threads == WARP ? __syncwarp() : __syncthreads(); }
    __device__ float sum(float v) const { return threads == WARP ? warp_sum(v) : block_sum(v); }
    __device__ float max(float v) const { return threads == WARP ? warp_max(v) : block_max(v); }
};

// ---- instructions of compute capability 8.0; a kernel that comes to one on an older GPU fails

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

// Four 8×8 matrices of bf16 in shared memory. Lane 8·i + j names row j of matrix i, 16 bytes; lane 4·g + t gets of each matrix columns 2t
// and 2t + 1 of row g; transposed, rows 2t and 2t + 1 of column g.
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

// ---- attention: what attention.cu and attention_bf16.cu have alike

#define THREADS 128u

struct AttentionLayout {
    u32 tq, tk, heads, kv_heads, h, causal;
    float scale;
};

// The kernels for head sizes up to 32·C, of the functions that each of the two files has.
#define BOUNDED(name) extern "C" __global__ void __launch_bounds__(THREADS) NAME(name, ELEMENT)
#define ATTENTION(C)                                                                                                               \
    BOUNDED(attention_##C)(const T* q, const T* k, const T* v, T* o, float* lse, u32 tq, u32 tk, u32 heads, u32 kv_heads, u32 h,   \
                           u32 causal, float scale) {                                                                              \
        attention<C>(q, k, v, o, lse, {tq, tk, heads, kv_heads, h, causal, scale});                                                \
    }                                                                                                                              \
    BOUNDED(attention_dq_##C)(const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dq,      \
                              u32 tq, u32 tk, u32 heads, u32 kv_heads, u32 h, u32 causal, float scale) {                           \
        attention_dq<C>(q, k, v, dout, lse, delta, dq, {tq, tk, heads, kv_heads, h, causal, scale});                               \
    }                                                                                                                              \
    BOUNDED(attention_dkv_##C)(const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dk,     \
                               T* dv, u32 tq, u32 tk, u32 heads, u32 kv_heads, u32 h, u32 causal, float scale) {                   \
        attention_dkv<C>(q, k, v, dout, lse, delta, dk, dv, {tq, tk, heads, kv_heads, h, causal, scale});                          \
    }
