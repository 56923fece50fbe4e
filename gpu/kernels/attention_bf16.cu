// Softmax attention in bf16 on tensor cores, forward and backward: the kernels of attention.cu, by name and arguments, for the
// other type, and for compute capability 8.0 or later. Scores are never in memory, only in registers, a few rows at a time; the
// backward computes them again from the log-sum-exp (Dao 2023, FlashAttention-2, arXiv 2307.08691). Sums of products, softmax and its
// gradient are f32; P and dS are rounded to bf16 before they are multiplied. Not here: asynchronous products and bulk copies of
// Hopper (wgmma, TMA).
//
// Letters: those of attention.cu, and D = 32·C ≥ h, the columns that are computed with: those from h on are zeros.
// One block is 4 warps. Of one side, queries or keys, 64·M rows stand still, 16·M in each warp. The rows of the other side pass
// by in shared memory, PASSING at a time, in two buffers: while some are multiplied the next are on their way. N of them are taken
// at once. To read a 16×16 block of them takes a processor 4 cycles, to multiply it by 16·M rows 3.3·M (H100: 128 bytes and, by
// these instructions, about 2,500 FLOP in a cycle): hence M = 2, but for D = 128, for which the registers suffice for M = 1.
//
// A product of 16×16 by 16×8 is what the tensor cores take. Of its 16×8 sums lane 4·g + t of the warp has rows g and g + 8, columns
// 2t and 2t + 1; two such blocks side by side, rounded, are its part of a 16×16 factor of the next product: P goes from the
// first to the second without leaving its lanes.

struct AttentionLayout {
    u32 tq, tk, heads, kv_heads, h, causal;
    float scale;
};

template <u32 C> struct Size {
    static constexpr u32 M = C < 4 ? 2 : 1, STANDING = THREADS / WARP * 16 * M;
    static constexpr u32 PASSING = 64, PASSING_BACK = C < 4 ? 64 : 32; // forward, backward
    // of a row in shared memory: 8 columns more than D, so that 16 bytes of each of 8 rows lie in all 32 banks
    static constexpr u32 WIDTH = C * 32 + 8;
};

// What a lane has of 16·M rows by N columns of sums: [16 rows][8 columns][2·(row g or g + 8) + column 2t or 2t + 1].
template <u32 M, u32 N> using Sums = float[M][N / 8][4];

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

__device__ u32 lane_row() { return threadIdx.x % WARP / 4; }        // g
__device__ u32 lane_column() { return threadIdx.x % WARP % 4 * 2; } // 2t
template <u32 C> __device__ u32 warp_row() { return threadIdx.x / WARP * 16 * Size<C>::M; }

// Starts to load rows first … first + HEIGHT − 1 of a head whose rows are `stride` apart; zeros from row `end` and from column h on.
template <u32 C, u32 HEIGHT> __device__ void load(T* tile, const T* head, u64 stride, u32 first, u32 end, u32 h) {
    if (h % 8 == 0) {
        constexpr u32 PIECES = C * 4; // 16 bytes each
        const u32 c = threadIdx.x % PIECES * 8;
        const T* from = head + (first + threadIdx.x / PIECES) * stride + c;
#pragma unroll
        for (u32 row = threadIdx.x / PIECES; row < HEIGHT; row += THREADS / PIECES) {
            const bool there = first + row < end && c < h;
            copy_async<16>(tile + row * Size<C>::WIDTH + c, there ? from : head, there);
            from += THREADS / PIECES * stride;
        }
    } else { // rows do not begin at multiples of 16 bytes
#pragma unroll 1 // small code, no registers
        for (u32 i = threadIdx.x; i < HEIGHT * C * 32; i += THREADS) {
            const u32 row = i / (C * 32), c = i % (C * 32);
            T x = {0};
            if (first + row < end && c < h) x = head[(first + row) * stride + c];
            tile[row * Size<C>::WIDTH + c] = x;
        }
    }
}

// Where this lane reads when the warp reads a 16×16 block as a first factor, or transposed as a second one: 8 of its columns in
// one of its rows. The four 8×8 matrices come in the order upper left, lower left, upper right, lower right;
template <u32 C> __device__ const T* own_piece(const T* block) {
    return block + threadIdx.x % 16 * Size<C>::WIDTH + threadIdx.x / 16 % 2 * 8;
}

// as a second factor upper left, upper right, lower left, lower right: what belongs together lies in neighbouring registers.
template <u32 C> __device__ const T* own_piece_of_second(const T* block) {
    return block + (threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8) * Size<C>::WIDTH + threadIdx.x / 8 % 2 * 8;
}

// The standing rows of this warp as first factors, in registers …
template <u32 C, u32 M> struct Kept {
    u32 blocks[M][C * 2][4];
    __device__ Kept(const T* rows) {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 k = 0; k < C * 2; k++) read_blocks(blocks[m][k], own_piece<C>(rows + m * 16 * Size<C>::WIDTH + k * 16));
        }
    }
    __device__ void block(u32 (&a)[4], u32 m, u32 k) const {
        for (u32 i = 0; i < 4; i++) a[i] = blocks[m][k][i];
    }
};

// … or read each time, where registers are short.
template <u32 C> struct InShared {
    const T* rows;
    __device__ void block(u32 (&a)[4], u32 m, u32 k) const {
        read_blocks(a, own_piece<C>(rows + m * 16 * Size<C>::WIDTH + k * 16));
    }
};

// s = standing·passingᵀ
template <u32 C, u32 M, u32 N, class Standing>
__device__ void rows_by_rows(Sums<M, N>& s, const Standing& standing, const T* passing) {
    passing = own_piece_of_second<C>(passing);
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < N / 8; n++) {
            for (u32 i = 0; i < 4; i++) s[m][n][i] = 0.0f;
        }
    }
#pragma unroll
    for (u32 k = 0; k < C * 2; k++) {
        u32 a[M][4];
#pragma unroll
        for (u32 m = 0; m < M; m++) standing.block(a[m], m, k);
#pragma unroll
        for (u32 n = 0; n < N / 16; n++) {
            u32 b[4];
            read_blocks(b, passing + n * 16 * Size<C>::WIDTH + k * 16);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                multiply_add(s[m][n * 2], a[m], b[0], b[1]);
                multiply_add(s[m][n * 2 + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum += weights·passing, the weights rounded
template <u32 C, u32 M, u32 N>
__device__ void weights_by_rows(Sums<M, C * 32>& sum, const Sums<M, N>& weights, const T* passing) {
    passing = own_piece<C>(passing);
#pragma unroll
    for (u32 k = 0; k < N / 16; k++) {
        u32 a[M][4];
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            const float(&left)[4] = weights[m][k * 2], (&right)[4] = weights[m][k * 2 + 1];
            a[m][0] = bf16_pair(left[0], left[1]), a[m][1] = bf16_pair(left[2], left[3]);
            a[m][2] = bf16_pair(right[0], right[1]), a[m][3] = bf16_pair(right[2], right[3]);
        }
#pragma unroll
        for (u32 n = 0; n < C * 2; n++) {
            u32 b[4];
            read_blocks_transposed(b, passing + k * 16 * Size<C>::WIDTH + n * 16);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                multiply_add(sum[m][n * 2], a[m], b[0], b[1]);
                multiply_add(sum[m][n * 2 + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum·scale (one for each of the lane's rows) to the standing rows of a head, by way of the warp's own rows of `tile`.
template <u32 C, u32 M>
__device__ void store(T* head, u64 stride, u32 first, u32 end, u32 h, const Sums<M, C * 32>& sum, const float (&scale)[M][2],
                      T* tile) {
    tile += warp_row<C>() * Size<C>::WIDTH, first += warp_row<C>();
    __syncwarp(); // all lanes are done with what was in it
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < C * 4; n++) {
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                T* at = tile + (m * 16 + r * 8 + lane_row()) * Size<C>::WIDTH + n * 8 + lane_column();
                *(u32*)at = bf16_pair(sum[m][n][r * 2] * scale[m][r], sum[m][n][r * 2 + 1] * scale[m][r]);
            }
        }
    }
    __syncwarp(); // a row is stored by other lanes than have computed it
    constexpr u32 PIECES = C * 4;
    const u32 c = threadIdx.x % WARP % PIECES * 8;
    for (u32 row = threadIdx.x % WARP / PIECES; row < M * 16; row += WARP / PIECES) {
        const T* from = tile + row * Size<C>::WIDTH + c;
        T* to = head + (first + row) * stride + c;
        if (first + row >= end || c >= h) continue;
        if (h % 8 == 0) {
            *(uint4*)to = *(const uint4*)from;
        } else {
            for (u32 i = 0; i < 8 && c + i < h; i++) to[i] = from[i];
        }
    }
}

__device__ float sum_of_row(float x) { // over the four lanes that have it
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// How many keys query i sees: none after its own position, where the queries are the last positions. Rows beyond the last query
// see all: nothing is stored of them.
__device__ u32 keys_seen(u32 i, const AttentionLayout& z) { return z.causal && i < z.tq ? i + 1 + z.tk - z.tq : z.tk; }

// The first query that sees a key.
__device__ u32 first_query(u32 key, const AttentionLayout& z) { return z.causal && key + z.tq > z.tk ? key + z.tq - z.tk : 0; }

// −∞ for keys that a query does not see. i, key: the lane's first row and column.
template <u32 M, u32 N> __device__ void hide_keys(Sums<M, N>& s, u32 i, u32 key, const AttentionLayout& z) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const int seen = (int)keys_seen(i + m * 16 + r * 8, z) - (int)key;
#pragma unroll
            for (u32 n = 0; n < N / 8; n++) {
                if ((int)(n * 8) >= seen) s[m][n][r * 2] = -INFINITE;
                if ((int)(n * 8 + 1) >= seen) s[m][n][r * 2 + 1] = -INFINITE;
            }
        }
    }
}

// −∞ for queries that do not see a key, scores being transposed. key, i: the lane's first row and column.
template <u32 M, u32 N> __device__ void hide_queries(Sums<M, N>& s, u32 key, u32 i, const AttentionLayout& z) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const int unseeing = (int)first_query(key + m * 16 + r * 8, z) - (int)i;
#pragma unroll
            for (u32 n = 0; n < N / 8; n++) {
                if ((int)(n * 8) < unseeing) s[m][n][r * 2] = -INFINITE;
                if ((int)(n * 8 + 1) < unseeing) s[m][n][r * 2 + 1] = -INFINITE;
            }
        }
    }
}

// O = P·V, P = softmax(scale·Q·Kᵀ), the sum of P's row and the maximum carried along. Grid: tiles of queries, heads, batch.
template <u32 C>
__device__ void attention(const T* q, const T* k, const T* v, T* o, float* lse, const AttentionLayout z) {
    constexpr u32 M = Size<C>::M, STANDING = Size<C>::STANDING, PASSING = Size<C>::PASSING, N = PASSING, WIDTH = Size<C>::WIDTH;
    DYNAMIC_SHARED(shared);
    T *sq = (T*)shared, *sk = sq + STANDING * WIDTH, *sv = sk + 2 * PASSING * WIDTH;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * STANDING; // under a causal mask the last tiles take longest: they start first
    const u32 head = blockIdx.y, kv_head = head / (z.heads / z.kv_heads);
    const u64 stride = (u64)z.heads * z.h, kv_stride = (u64)z.kv_heads * z.h;
    q += blockIdx.z * z.tq * stride + head * z.h, o += blockIdx.z * z.tq * stride + head * z.h;
    k += blockIdx.z * z.tk * kv_stride + kv_head * z.h, v += blockIdx.z * z.tk * kv_stride + kv_head * z.h;
    lse += ((u64)blockIdx.z * z.heads + head) * z.tq;
    const u32 warp_first = first + warp_row<C>(), lane_first = warp_first + lane_row();
    const u32 keys = keys_seen(first + STANDING - 1, z);                                          // by any row of the block,
    const u32 by_some = keys_seen(warp_first + 16 * M - 1, z), by_all = keys_seen(warp_first, z); // of the warp
    const float to_log2 = z.scale * LOG2_E;

    load<C, STANDING>(sq, q, stride, first, z.tq, z.h);
    load<C, PASSING>(sk, k, kv_stride, 0, z.tk, z.h);
    load<C, PASSING>(sv, v, kv_stride, 0, z.tk, z.h);
    wait_for_copies();
    __syncthreads();
    const Kept<C, M> queries(sq + warp_row<C>() * WIDTH);
    float top[M][2], total[M][2]; // total: of this lane's columns
    Sums<M, C * 32> sum = {};
    for (u32 m = 0; m < M; m++) {
        for (u32 r = 0; r < 2; r++) top[m][r] = -INFINITE, total[m][r] = 0.0f;
    }
    for (u32 start = 0, buffer = 0; start < keys; start += PASSING, buffer ^= 1) {
        wait_for_copies();
        __syncthreads(); // these rows are there, whoever copied them, and all warps are done with those before
        if (start + PASSING < keys) {
            load<C, PASSING>(sk + (buffer ^ 1) * PASSING * WIDTH, k, kv_stride, start + PASSING, z.tk, z.h);
            load<C, PASSING>(sv + (buffer ^ 1) * PASSING * WIDTH, v, kv_stride, start + PASSING, z.tk, z.h);
        }
        if (start >= by_some) continue; // the whole warp
        Sums<M, N> s;
        rows_by_rows<C, M, N>(s, queries, sk + buffer * PASSING * WIDTH);
        if (start + N > by_all) hide_keys<M, N>(s, lane_first, start + lane_column(), z);
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                float higher = top[m][r];
#pragma unroll
                for (u32 n = 0; n < N / 8; n++) higher = fmaxf(higher, fmaxf(s[m][n][r * 2], s[m][n][r * 2 + 1]));
                higher = max_of_row(higher);
                const float shift = higher * to_log2, shrink = exp2_approx(top[m][r] * to_log2 - shift);
                top[m][r] = higher;
                total[m][r] *= shrink;
#pragma unroll
                for (u32 n = 0; n < N / 8; n++) {
#pragma unroll
                    for (u32 i = r * 2; i < r * 2 + 2; i++) {
                        s[m][n][i] = exp2_approx(s[m][n][i] * to_log2 - shift);
                        total[m][r] += s[m][n][i];
                    }
                }
#pragma unroll
                for (u32 n = 0; n < C * 4; n++) sum[m][n][r * 2] *= shrink, sum[m][n][r * 2 + 1] *= shrink;
            }
        }
        weights_by_rows<C, M, N>(sum, s, sv + buffer * PASSING * WIDTH);
    }
    float inverse[M][2];
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u32 i = lane_first + m * 16 + r * 8;
            const float all = sum_of_row(total[m][r]);
            inverse[m][r] = 1.0f / all;
            if (lane_column() == 0 && i < z.tq) lse[i] = top[m][r] * z.scale + logf(all);
        }
    }
    store<C, M>(o, stride, first, z.tq, z.h, sum, inverse, sq);
}

// ---- backward: dP = dO·Vᵀ, dS = P∘(dP − delta), delta = rowsum(dO∘O); dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO

// Lanes that share a row of delta, 8 columns each; backend.rs knows the number too.
__device__ u32 lanes_of_row(u32 h) { return h <= 32 ? 4 : h <= 64 ? 8 : 16; }

// `rows` = batch·tq·heads.
KERNEL(attention_delta)(const T* o, const T* dout, float* delta, u64 rows, u32 heads, u32 tq, u32 h) {
    const u32 lanes = lanes_of_row(h), c = threadIdx.x % lanes * 8;
    const u64 i = (u64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes; // (sequence·tq + query)·heads + head
    float sum = 0.0f;
    if (i < rows && c < h) {
        o += i * h + c, dout += i * h + c;
        if (h % 8 == 0) {
            const uint4 x = *(const uint4*)o, y = *(const uint4*)dout;
            const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (u32 j = 0; j < 4; j++) sum += bf16_first(xs[j]) * bf16_first(ys[j]) + bf16_second(xs[j]) * bf16_second(ys[j]);
        } else {
            for (u32 j = 0; j < 8 && c + j < h; j++) sum += o[j] * dout[j];
        }
    }
    for (u32 apart = lanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
    const u64 head = i % heads, query = i / heads % tq, sequence = i / heads / tq;
    if (i < rows && c == 0) delta[(sequence * heads + head) * tq + query] = sum;
}

// Queries stand, keys pass. Grid as above.
template <u32 C>
__device__ void attention_dq(const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dq,
                             const AttentionLayout z) {
    constexpr u32 M = Size<C>::M, STANDING = Size<C>::STANDING, PASSING = Size<C>::PASSING_BACK, N = 32, WIDTH = Size<C>::WIDTH;
    DYNAMIC_SHARED(shared);
    T *sq = (T*)shared, *sd = sq + STANDING * WIDTH, *sk = sd + STANDING * WIDTH, *sv = sk + 2 * PASSING * WIDTH;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * STANDING; // as above
    const u32 head = blockIdx.y, kv_head = head / (z.heads / z.kv_heads);
    const u64 stride = (u64)z.heads * z.h, kv_stride = (u64)z.kv_heads * z.h;
    const u64 at = blockIdx.z * z.tq * stride + head * z.h;
    k += blockIdx.z * z.tk * kv_stride + kv_head * z.h, v += blockIdx.z * z.tk * kv_stride + kv_head * z.h;
    lse += ((u64)blockIdx.z * z.heads + head) * z.tq, delta += ((u64)blockIdx.z * z.heads + head) * z.tq;
    const u32 warp_first = first + warp_row<C>(), lane_first = warp_first + lane_row();
    const u32 keys = keys_seen(first + STANDING - 1, z);                                          // as above
    const u32 by_some = keys_seen(warp_first + 16 * M - 1, z), by_all = keys_seen(warp_first, z);
    const float to_log2 = z.scale * LOG2_E;

    load<C, STANDING>(sq, q + at, stride, first, z.tq, z.h);
    load<C, STANDING>(sd, dout + at, stride, first, z.tq, z.h);
    load<C, PASSING>(sk, k, kv_stride, 0, z.tk, z.h);
    load<C, PASSING>(sv, v, kv_stride, 0, z.tk, z.h);
    float log_total[M][2], pull[M][2], scale[M][2];
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u32 i = lane_first + m * 16 + r * 8;
            log_total[m][r] = i < z.tq ? lse[i] * LOG2_E : 0.0f, pull[m][r] = i < z.tq ? delta[i] : 0.0f;
            scale[m][r] = z.scale;
        }
    }
    wait_for_copies();
    __syncthreads();
    const Kept<C, M> queries(sq + warp_row<C>() * WIDTH), douts(sd + warp_row<C>() * WIDTH);
    Sums<M, C * 32> sum = {};
    for (u32 start = 0, buffer = 0; start < keys; start += PASSING, buffer ^= 1) {
        wait_for_copies();
        __syncthreads(); // as above
        if (start + PASSING < keys) {
            load<C, PASSING>(sk + (buffer ^ 1) * PASSING * WIDTH, k, kv_stride, start + PASSING, z.tk, z.h);
            load<C, PASSING>(sv + (buffer ^ 1) * PASSING * WIDTH, v, kv_stride, start + PASSING, z.tk, z.h);
        }
#pragma unroll 1
        for (u32 part = 0; part < PASSING && start + part < by_some; part += N) {
            const T *keys_now = sk + (buffer * PASSING + part) * WIDTH, *values_now = sv + (buffer * PASSING + part) * WIDTH;
            Sums<M, N> s, dp;
            rows_by_rows<C, M, N>(s, queries, keys_now);
            if (start + part + N > by_all) hide_keys<M, N>(s, lane_first, start + part + lane_column(), z);
            rows_by_rows<C, M, N>(dp, douts, values_now);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 n = 0; n < N / 8; n++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        s[m][n][i] = exp2_approx(s[m][n][i] * to_log2 - log_total[m][i / 2]) * (dp[m][n][i] - pull[m][i / 2]);
                    }
                }
            }
            weights_by_rows<C, M, N>(sum, s, keys_now);
        }
    }
    store<C, M>(dq + at, stride, first, z.tq, z.h, sum, scale, sq);
}

// Keys stand, queries pass: those of each head of the group in turn, so that dK and dV are summed in a fixed order. Scores are
// transposed: a lane's rows are keys. Grid: tiles of keys, key/value heads, batch.
template <u32 C>
__device__ void attention_dkv(const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dk,
                              T* dv, const AttentionLayout z) {
    constexpr u32 M = Size<C>::M, STANDING = Size<C>::STANDING, PASSING = Size<C>::PASSING_BACK, N = 32, WIDTH = Size<C>::WIDTH;
    DYNAMIC_SHARED(shared);
    T *sk = (T*)shared, *sv = sk + STANDING * WIDTH, *sq = sv + STANDING * WIDTH, *sd = sq + 2 * PASSING * WIDTH;
    float* stats = (float*)(sd + 2 * PASSING * WIDTH); // of each buffer's queries: log-sum-exps, then deltas
    const u32 first = blockIdx.x * STANDING, kv_head = blockIdx.y, group = z.heads / z.kv_heads;
    const u64 stride = (u64)z.heads * z.h, kv_stride = (u64)z.kv_heads * z.h;
    const u64 at = blockIdx.z * z.tk * kv_stride + kv_head * z.h;
    const u32 warp_first = first + warp_row<C>(), lane_first = warp_first + lane_row();
    const u32 from = first_query(first, z); // none before it sees a key of the block,
    const u32 by_some = first_query(warp_first, z), by_all = first_query(warp_first + 16 * M - 1, z); // of the warp
    const float to_log2 = z.scale * LOG2_E;

    // Queries beyond the last are zeros, and so are their dO, log-sum-exp and delta: P is 1 then, dS 0, and nothing is added.
    const auto load_queries = [&](u32 buffer, u32 head, u32 start) {
        const u64 q_at = blockIdx.z * z.tq * stride + head * z.h, stats_at = ((u64)blockIdx.z * z.heads + head) * z.tq;
        load<C, PASSING>(sq + buffer * PASSING * WIDTH, q + q_at, stride, start, z.tq, z.h);
        load<C, PASSING>(sd + buffer * PASSING * WIDTH, dout + q_at, stride, start, z.tq, z.h);
        for (u32 j = threadIdx.x; j < 2 * PASSING; j += THREADS) {
            const u32 i = start + j % PASSING;
            const float* source = (j < PASSING ? lse : delta) + stats_at;
            copy_async<4>(stats + buffer * 2 * PASSING + j, i < z.tq ? source + i : source, i < z.tq);
        }
    };
    load<C, STANDING>(sk, k + at, kv_stride, first, z.tk, z.h);
    load<C, STANDING>(sv, v + at, kv_stride, first, z.tk, z.h);
    const InShared<C> keys = {sk + warp_row<C>() * WIDTH}, values = {sv + warp_row<C>() * WIDTH};
    Sums<M, C * 32> sum_k = {}, sum_v = {};
    const u32 end_head = (kv_head + (from < z.tq)) * group; // no head if no query sees a key
    if (from < z.tq) load_queries(0, kv_head * group, from);
    wait_for_copies();
    __syncthreads();
    for (u32 head = kv_head * group, start = from, buffer = 0; head < end_head; buffer ^= 1) {
        wait_for_copies();
        __syncthreads(); // as above
        const bool last = start + PASSING >= z.tq; // queries of this head
        const u32 next_head = head + last, next_start = last ? from : start + PASSING;
        if (next_head < end_head) load_queries(buffer ^ 1, next_head, next_start);
#pragma unroll 1
        for (u32 part = 0; part < PASSING; part += N) {
            if (start + part + N <= by_some) continue; // the whole warp
            const T *queries_now = sq + (buffer * PASSING + part) * WIDTH, *douts_now = sd + (buffer * PASSING + part) * WIDTH;
            const float* log_totals = stats + buffer * 2 * PASSING + part + lane_column();
            Sums<M, N> p, dp;
            rows_by_rows<C, M, N>(p, keys, queries_now);
            if (start + part < by_all) hide_queries<M, N>(p, lane_first, start + part + lane_column(), z);
#pragma unroll
            for (u32 n = 0; n < N / 8; n++) {
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    const float log_total = log_totals[n * 8 + e] * LOG2_E;
#pragma unroll
                    for (u32 m = 0; m < M; m++) {
                        p[m][n][e] = exp2_approx(p[m][n][e] * to_log2 - log_total);
                        p[m][n][2 + e] = exp2_approx(p[m][n][2 + e] * to_log2 - log_total);
                    }
                }
            }
            weights_by_rows<C, M, N>(sum_v, p, douts_now);
            rows_by_rows<C, M, N>(dp, values, douts_now);
#pragma unroll
            for (u32 n = 0; n < N / 8; n++) {
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    const float pull = log_totals[PASSING + n * 8 + e];
#pragma unroll
                    for (u32 m = 0; m < M; m++) {
                        p[m][n][e] *= dp[m][n][e] - pull;
                        p[m][n][2 + e] *= dp[m][n][2 + e] - pull;
                    }
                }
            }
            weights_by_rows<C, M, N>(sum_k, p, queries_now);
        }
        head = next_head, start = next_start;
    }
    float scale[M][2], one[M][2];
    for (u32 m = 0; m < M; m++) {
        for (u32 r = 0; r < 2; r++) scale[m][r] = z.scale, one[m][r] = 1.0f;
    }
    store<C, M>(dk + at, kv_stride, first, z.tk, z.h, sum_k, scale, sk);
    store<C, M>(dv + at, kv_stride, first, z.tk, z.h, sum_v, one, sv);
}

ATTENTION(1)
ATTENTION(2)
ATTENTION(4)
