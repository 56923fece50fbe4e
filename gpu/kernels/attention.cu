// Softmax attention, forward and backward, tile by tile: scores exist for one tile of queries and one of keys at a time. Only the
// log-sum-exp of each query is kept; the backward recomputes probabilities from it (Dao et al. 2022, arXiv 2205.14135).
// For T = f32, on the ordinary cores; not here: tensor cores, which would round f32 (for bf16 see attention_bf16.cu).
//
// Letters: q, o, dout, dq [batch·tq, heads·h]; k, v, dk, dv [batch·tk, kv_heads·h]; lse, delta [batch, heads, tq]; h head size.
// One block is 4 warps and one tile of 32 rows, which stand still while tiles of 32 rows of the other side pass by. Each warp has
// 8 of the standing rows: in a product of rows with rows a lane is a passing row, in one of weights with rows a lane is a column
// (and C of them, 32 apart, where h is up to 32·C).

#define TILE 32u
#define ROWS (TILE * WARP / THREADS)

// A tile in shared memory: rows as wide as C·32 columns, and one more, so that equal columns of 32 rows lie in 32 banks.
template <u32 C> struct Tile {
    static constexpr u32 WIDTH = C * WARP + 1, SIZE = TILE * WIDTH;
};

// Rows first … first + 31 of a head whose rows are `stride` apart; zeros from row `end` and from column h on.
template <u32 C> __device__ void load(float* tile, const T* head, u64 stride, u32 first, u32 end, u32 h) {
    for (u32 row = threadIdx.x / WARP; row < TILE; row += THREADS / WARP) {
        for (u32 c = threadIdx.x % WARP; c < C * WARP; c += WARP) {
            tile[row * Tile<C>::WIDTH + c] = first + row < end && c < h ? head[(first + row) * stride + c] : 0.0f;
        }
    }
}

// s[r] = standing row r of this warp · passing row of this lane.
template <u32 C> __device__ void rows_by_rows(float (&s)[ROWS], const float* standing, const float* passing, u32 h) {
    standing += threadIdx.x / WARP * ROWS * Tile<C>::WIDTH, passing += threadIdx.x % WARP * Tile<C>::WIDTH;
    for (u32 r = 0; r < ROWS; r++) s[r] = 0.0f;
    for (u32 c = 0; c < h; c++) {
        const float y = passing[c];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) s[r] += standing[r * Tile<C>::WIDTH + c] * y;
    }
}

// sum[r] += Σ over passing rows of weight(r, row)·row, this lane's columns. `weights` holds this warp's own rows.
template <u32 C> __device__ void weights_by_rows(float (&sum)[ROWS][C], const float* weights, const float* passing) {
    weights += threadIdx.x / WARP * ROWS * TILE, passing += threadIdx.x % WARP;
    for (u32 row = 0; row < TILE; row++) {
#pragma unroll
        for (u32 j = 0; j < C; j++) {
            const float y = passing[row * Tile<C>::WIDTH + j * WARP];
            for (u32 r = 0; r < ROWS; r++) sum[r][j] += weights[r * TILE + row] * y;
        }
    }
}

// scale·sum[r] to the standing rows of a head, this lane's columns.
template <u32 C>
__device__ void store(T* head, u64 stride, u32 first, u32 end, u32 h, const float (&sum)[ROWS][C], const float (&scale)[ROWS]) {
    for (u32 r = 0; r < ROWS; r++) {
        const u32 row = first + threadIdx.x / WARP * ROWS + r;
        for (u32 j = 0; j < C; j++) {
            const u32 c = threadIdx.x % WARP + j * WARP;
            if (row < end && c < h) head[row * stride + c] = scale[r] * sum[r][j];
        }
    }
}

// Whether query i sees a key: none after its own position, where the queries are the last positions.
__device__ bool sees(u32 i, u32 key, const AttentionLayout& z) { return key < z.tk && (!z.causal || key + z.tq <= i + z.tk); }

// One more than the last key that a query before `end` sees.
__device__ u32 keys_before(u32 end, const AttentionLayout& z) { return z.causal ? (end < z.tq ? end : z.tq) + z.tk - z.tq : z.tk; }

// O = P·V, P = softmax(scale·Q·Kᵀ), the sum of P's row and its maximum carried along. Grid: tiles of queries, heads, batch.
template <u32 C>
__device__ void attention(const T* q, const T* k, const T* v, T* o, float* lse, const AttentionLayout z) {
    DYNAMIC_SHARED(shared);
    float *sq = shared, *sk = sq + Tile<C>::SIZE, *sv = sk + Tile<C>::SIZE, *sp = sv + Tile<C>::SIZE;
    const u32 lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * ROWS;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * TILE; // under a causal mask the last tiles take longest: they start first
    const u32 head = blockIdx.y, kv_head = head / (z.heads / z.kv_heads);
    const u64 stride = (u64)z.heads * z.h, kv_stride = (u64)z.kv_heads * z.h;
    q += blockIdx.z * z.tq * stride + head * z.h, o += blockIdx.z * z.tq * stride + head * z.h;
    k += blockIdx.z * z.tk * kv_stride + kv_head * z.h, v += blockIdx.z * z.tk * kv_stride + kv_head * z.h;
    lse += ((u64)blockIdx.z * z.heads + head) * z.tq;

    load<C>(sq, q, stride, first, z.tq, z.h);
    float top[ROWS], total[ROWS], sum[ROWS][C] = {};
    for (u32 r = 0; r < ROWS; r++) top[r] = -INFINITE, total[r] = 0.0f;
    const u32 keys = keys_before(first + TILE, z);
    for (u32 start = 0; start < keys; start += TILE) {
        __syncthreads(); // all warps are done with the tiles before
        load<C>(sk, k, kv_stride, start, z.tk, z.h);
        load<C>(sv, v, kv_stride, start, z.tk, z.h);
        __syncthreads();
        float s[ROWS];
        rows_by_rows<C>(s, sq, sk, z.h);
        for (u32 r = 0; r < ROWS; r++) {
            // rows beyond the last query count as ones that see as much: nothing is stored of them
            const float score = sees(first + first_row + r, start + lane, z) ? s[r] * z.scale : -INFINITE;
            const float higher = fmaxf(top[r], warp_max(score));
            const float p = expf(score - higher), shrink = expf(top[r] - higher);
            top[r] = higher;
            total[r] = total[r] * shrink + warp_sum(p);
            for (u32 j = 0; j < C; j++) sum[r][j] *= shrink;
            sp[(first_row + r) * TILE + lane] = p;
        }
        __syncwarp(); // the warp reads only its own rows of P
        weights_by_rows<C>(sum, sp, sv);
    }
    float inverse[ROWS];
    for (u32 r = 0; r < ROWS; r++) {
        const u32 i = first + first_row + r;
        inverse[r] = 1.0f / total[r];
        if (lane == 0 && i < z.tq) lse[i] = top[r] + logf(total[r]);
    }
    store<C>(o, stride, first, z.tq, z.h, sum, inverse);
}

// ---- backward: dP = dO·Vᵀ, dS = scale·P∘(dP − delta), delta = rowsum(dO∘O); dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dO

// One warp for each row of each head; `rows` = batch·tq·heads.
KERNEL(attention_delta)(const T* o, const T* dout, float* delta, u64 rows, u32 heads, u32 tq, u32 h) {
    const u64 i = (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; // (sequence·tq + query)·heads + head
    if (i >= rows) return;                                                    // the whole warp
    float sum = 0.0f;
    for (u32 c = threadIdx.x % WARP; c < h; c += WARP) sum += o[i * h + c] * dout[i * h + c];
    sum = warp_sum(sum);
    const u64 head = i % heads, query = i / heads % tq, sequence = i / heads / tq;
    if (threadIdx.x % WARP == 0) delta[(sequence * heads + head) * tq + query] = sum;
}

// Queries stand, keys pass. Grid as above.
template <u32 C>
__device__ void attention_dq(const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dq,
                             const AttentionLayout z) {
    DYNAMIC_SHARED(shared);
    float *sq = shared, *sd = sq + Tile<C>::SIZE, *sk = sd + Tile<C>::SIZE, *sv = sk + Tile<C>::SIZE, *sp = sv + Tile<C>::SIZE;
    const u32 lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * ROWS;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * TILE; // as above
    const u32 head = blockIdx.y, kv_head = head / (z.heads / z.kv_heads);
    const u64 stride = (u64)z.heads * z.h, kv_stride = (u64)z.kv_heads * z.h;
    const u64 at = blockIdx.z * z.tq * stride + head * z.h;
    k += blockIdx.z * z.tk * kv_stride + kv_head * z.h, v += blockIdx.z * z.tk * kv_stride + kv_head * z.h;
    lse += ((u64)blockIdx.z * z.heads + head) * z.tq, delta += ((u64)blockIdx.z * z.heads + head) * z.tq;

    load<C>(sq, q + at, stride, first, z.tq, z.h);
    load<C>(sd, dout + at, stride, first, z.tq, z.h);
    float sum[ROWS][C] = {};
    const u32 keys = keys_before(first + TILE, z);
    for (u32 start = 0; start < keys; start += TILE) {
        __syncthreads();
        load<C>(sk, k, kv_stride, start, z.tk, z.h);
        load<C>(sv, v, kv_stride, start, z.tk, z.h);
        __syncthreads();
        float s[ROWS], dp[ROWS];
        rows_by_rows<C>(s, sq, sk, z.h);
        rows_by_rows<C>(dp, sd, sv, z.h);
        for (u32 r = 0; r < ROWS; r++) {
            const u32 i = first + first_row + r;
            const bool seen = i < z.tq && sees(i, start + lane, z);
            sp[(first_row + r) * TILE + lane] = seen ? expf(s[r] * z.scale - lse[i]) * (dp[r] - delta[i]) * z.scale : 0.0f;
        }
        __syncwarp();
        weights_by_rows<C>(sum, sp, sk);
    }
    const float one[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    store<C>(dq + at, stride, first, z.tq, z.h, sum, one);
}

// Keys stand, queries pass: those of each head of the group in turn, so that dK and dV are summed in a fixed order. Grid: tiles of
// keys, key/value heads, batch.
template <u32 C>
__device__ void attention_dkv(const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dk,
                              T* dv, const AttentionLayout z) {
    DYNAMIC_SHARED(shared);
    float *sk = shared, *sv = sk + Tile<C>::SIZE, *sq = sv + Tile<C>::SIZE, *sd = sq + Tile<C>::SIZE;
    float *sp = sd + Tile<C>::SIZE, *ss = sp + TILE * TILE;
    const u32 lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * ROWS;
    const u32 first = blockIdx.x * TILE, kv_head = blockIdx.y, group = z.heads / z.kv_heads;
    const u64 stride = (u64)z.heads * z.h, kv_stride = (u64)z.kv_heads * z.h;
    const u64 at = blockIdx.z * z.tk * kv_stride + kv_head * z.h;

    load<C>(sk, k + at, kv_stride, first, z.tk, z.h);
    load<C>(sv, v + at, kv_stride, first, z.tk, z.h);
    float sum_k[ROWS][C] = {}, sum_v[ROWS][C] = {};
    // the first query that sees a key of this tile, down to a whole tile
    const u32 past = z.tk - z.tq, from = z.causal && first > past ? (first - past) / TILE * TILE : 0;
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const u64 q_at = blockIdx.z * z.tq * stride + head * z.h, stats = ((u64)blockIdx.z * z.heads + head) * z.tq;
        for (u32 start = from; start < z.tq; start += TILE) {
            __syncthreads();
            load<C>(sq, q + q_at, stride, start, z.tq, z.h);
            load<C>(sd, dout + q_at, stride, start, z.tq, z.h);
            __syncthreads();
            float s[ROWS], dp[ROWS];
            rows_by_rows<C>(s, sk, sq, z.h);
            rows_by_rows<C>(dp, sv, sd, z.h);
            const u32 i = start + lane;
            const float log_total = i < z.tq ? lse[stats + i] : 0.0f, pull = i < z.tq ? delta[stats + i] : 0.0f;
            for (u32 r = 0; r < ROWS; r++) {
                const bool seen = i < z.tq && sees(i, first + first_row + r, z);
                const float p = seen ? expf(s[r] * z.scale - log_total) : 0.0f;
                sp[(first_row + r) * TILE + lane] = p;
                ss[(first_row + r) * TILE + lane] = seen ? p * (dp[r] - pull) * z.scale : 0.0f;
            }
            __syncwarp();
            weights_by_rows<C>(sum_v, sp, sd);
            weights_by_rows<C>(sum_k, ss, sq);
        }
    }
    const float one[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    store<C>(dk + at, kv_stride, first, z.tk, z.h, sum_k, one);
    store<C>(dv + at, kv_stride, first, z.tk, z.h, sum_v, one);
}

ATTENTION(1)
ATTENTION(2)
ATTENTION(4)
