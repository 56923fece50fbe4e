// Kernels with one block for each row, and sums over the rows or over everything.

// ---- softmax: y = eˣ / Σ eˣ; dx = y ∘ (dy − y·dy)

// Σ e^(x − top) over the row, and top, the largest x.
struct Exponentials {
    float total, top;
};
__device__ Exponentials exponentials(const T* x, u32 d) {
    float top = -INFINITE;
    FOR_COLUMNS(c, d) top = fmaxf(top, x[c]);
    top = block_max(top);
    float total = 0.0f;
    FOR_COLUMNS(c, d) total += expf(x[c] - top);
    return {block_sum(total), top};
}

KERNEL(softmax)(const T* x, T* y, u32 d) {
    x += (u64)blockIdx.x * d, y += (u64)blockIdx.x * d;
    const Exponentials e = exponentials(x, d);
    const float scale = 1.0f / e.total;
    FOR_COLUMNS(c, d) y[c] = expf(x[c] - e.top) * scale;
}

KERNEL(softmax_grad)(const T* y, const T* dy, T* dx, u32 d) {
    y += (u64)blockIdx.x * d, dy += (u64)blockIdx.x * d, dx += (u64)blockIdx.x * d;
    float mean = 0.0f;
    FOR_COLUMNS(c, d) mean += y[c] * dy[c];
    mean = block_sum(mean);
    FOR_COLUMNS(c, d) dx[c] = y[c] * (dy[c] - mean);
}

// ---- cross_entropy: loss of a row = ln Σ eˣ − x[target]; dx = (softmax(x) − onehot(target)) / n

KERNEL(cross_entropy)(const T* x, const u32* targets, T* dx, double* losses, u32 d, float inv_n) {
    const u32 target = targets[blockIdx.x];
    x += (u64)blockIdx.x * d, dx += (u64)blockIdx.x * d;
    const Exponentials e = exponentials(x, d);
    const float scale = inv_n / e.total;
    FOR_COLUMNS(c, d) dx[c] = expf(x[c] - e.top) * scale - (c == target ? inv_n : 0.0f);
    if (threadIdx.x == 0) losses[blockIdx.x] = log((double)e.total) - (x[target] - e.top);
}

// The mean of n losses. One block.
KERNEL(mean_loss)(const double* losses, float* mean, u32 n) {
    double sum = 0.0;
    FOR_COLUMNS(i, n) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *mean = (float)(sum / n);
}

// ---- rms_norm: y = g ∘ x·s, s = 1/√(mean x² + eps)
//      dx = s·(g∘dy) − x·s³·mean(x ∘ g∘dy); dg = Σ_rows dy ∘ x·s: rms_norm_gain below

KERNEL(rms_norm)(const T* x, const T* g, T* y, float* inv_rms, u32 d, float eps) {
    x += (u64)blockIdx.x * d, y += (u64)blockIdx.x * d;
    float squares = 0.0f;
    FOR_COLUMNS(c, d) squares += x[c] * x[c];
    const float s = 1.0f / sqrtf(block_sum(squares) / d + eps);
    if (threadIdx.x == 0) inv_rms[blockIdx.x] = s;
    FOR_COLUMNS(c, d) y[c] = g[c] * x[c] * s;
}

KERNEL(rms_norm_grad)(const T* x, const T* g, const float* inv_rms, const T* dy, T* dx, u32 d) {
    const float s = inv_rms[blockIdx.x];
    x += (u64)blockIdx.x * d, dy += (u64)blockIdx.x * d, dx += (u64)blockIdx.x * d;
    float along = 0.0f;
    FOR_COLUMNS(c, d) along += x[c] * (g[c] * dy[c]);
    const float pull = block_sum(along) / d * s * s * s;
    FOR_COLUMNS(c, d) dx[c] = g[c] * dy[c] * s - x[c] * pull;
}

// ---- layer_norm: z = (x − mean)·s, s = 1/√(var + eps), y = g ∘ z + b; stats are mean and s
//      dx = s·(g∘dy − mean(g∘dy) − z·mean(z ∘ g∘dy)); dg = Σ_rows dy ∘ z; db = Σ_rows dy: layer_norm_gain, sum_rows below

KERNEL(layer_norm)(const T* x, const T* g, const T* b, T* y, float* stats, u32 d, float eps) {
    x += (u64)blockIdx.x * d, y += (u64)blockIdx.x * d, stats += (u64)blockIdx.x * 2;
    float sum = 0.0f, squares = 0.0f;
    FOR_COLUMNS(c, d) sum += x[c];
    const float mean = block_sum(sum) / d;
    FOR_COLUMNS(c, d) squares += (x[c] - mean) * (x[c] - mean);
    const float s = 1.0f / sqrtf(block_sum(squares) / d + eps);
    if (threadIdx.x == 0) stats[0] = mean, stats[1] = s;
    FOR_COLUMNS(c, d) y[c] = g[c] * (x[c] - mean) * s + b[c];
}

KERNEL(layer_norm_grad)(const T* x, const T* g, const float* stats, const T* dy, T* dx, u32 d) {
    const float mean = stats[2 * blockIdx.x], s = stats[2 * blockIdx.x + 1];
    x += (u64)blockIdx.x * d, dy += (u64)blockIdx.x * d, dx += (u64)blockIdx.x * d;
    float sum = 0.0f, along = 0.0f;
    FOR_COLUMNS(c, d) {
        const float gdy = g[c] * dy[c];
        sum += gdy;
        along += (x[c] - mean) * s * gdy;
    }
    const float mean_gdy = block_sum(sum) / d, mean_along = block_sum(along) / d;
    FOR_COLUMNS(c, d) dx[c] = s * (g[c] * dy[c] - mean_gdy - (x[c] - mean) * s * mean_along);
}

// ---- sums over the rows of a [n, d]: y [chunks, d], row k the sum of rows k·chunk … (k + 1)·chunk − 1 of the input. A second
//      launch over y, of sum_rows_f32, adds up the chunks.
// A block is 32 columns wide and blockDim.x / 32 rows high: neighbours read neighbours, and the heights are added at the end.

template <class Term> __device__ void column_sums(Term term, float* y, u64 n, u32 d, u32 chunk) {
    __shared__ float part[1024];
    const u32 column = blockIdx.x * WARP + threadIdx.x % WARP, height = blockDim.x / WARP;
    const u64 end = (blockIdx.y + 1ull) * chunk;
    float sum = 0.0f;
    if (column < d) {
        for (u64 row = (u64)blockIdx.y * chunk + threadIdx.x / WARP; row < n && row < end; row += height) {
            sum += term(row, row * d + column);
        }
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < WARP && column < d) {
        for (u32 h = 1; h < height; h++) sum += part[h * WARP + threadIdx.x];
        y[(u64)blockIdx.y * d + column] = sum;
    }
}

KERNEL(sum_rows)(const T* x, float* y, u64 n, u32 d, u32 chunk) {
    column_sums([=](u64, u64 i) { return x[i]; }, y, n, d, chunk);
}

KERNEL(rms_norm_gain)(const T* x, const float* inv_rms, const T* dy, float* y, u64 n, u32 d, u32 chunk) {
    column_sums([=](u64 row, u64 i) { return dy[i] * x[i] * inv_rms[row]; }, y, n, d, chunk);
}

KERNEL(layer_norm_gain)(const T* x, const float* stats, const T* dy, float* y, u64 n, u32 d, u32 chunk) {
    column_sums([=](u64 row, u64 i) { return dy[i] * (x[i] - stats[2 * row]) * stats[2 * row + 1]; }, y, n, d, chunk);
}

// ---- sums over everything: of each tensor of a batch, one f64 for each of its parts [tensors, parts of the largest], then the sum of
//      those. f64 squares of f32 are always in range. How a tensor is cut depends on its length alone. Grid: tensors, parts.

struct Whole {
    const T* x;
    u64 n, parts;
};

template <class Term> __device__ void part_sum(const Whole& whole, Term term, double* parts) {
    if (blockIdx.y >= whole.parts) return; // the whole block
    double sum = 0.0;
    for (u64 i = (u64)blockIdx.y * blockDim.x + threadIdx.x; i < whole.n; i += whole.parts * blockDim.x) sum += term(whole.x[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[(u64)blockIdx.x * gridDim.y + blockIdx.y] = sum;
}

KERNEL(sum)(const Whole* all, double* parts) {
    part_sum(all[blockIdx.x], [](float x) { return (double)x; }, parts);
}

KERNEL(sum_squares)(const Whole* all, double* parts) {
    part_sum(all[blockIdx.x], [](float x) { return (double)x * x; }, parts);
}

// One block for each tensor; `most` parts of the largest.
KERNEL(sum_parts)(const Whole* all, const double* parts, double* sums, u32 most) {
    double sum = 0.0;
    FOR_COLUMNS(i, all[blockIdx.x].parts) sum += parts[(u64)blockIdx.x * most + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
