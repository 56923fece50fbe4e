// Kernels that look at a whole row, and sums over the rows or over everything.
//
// `at` is a thread's part in its row. Kernels launched for n rows may have blocks that begin before row n and end behind it.

// ---- softmax: y = eˣ / Σ eˣ; dx = y ∘ (dy − y·dy)

// eˣ in half the instructions of expf: cross_entropy would otherwise wait for them, and not for memory. Its error grows with |x|, as
// if x had been rounded.
__device__ float power(float x) { return exp2f(x * 1.44269504f); }

// Σ e^(x − top) over the row, and top, the largest x.
struct Exponentials {
    float total, top;
};
template <class X> __device__ Exponentials exponentials(const Row<T>& at, const X& x) {
    float top = -INFINITE, total = 0.0f;
    at.columns([&](u32, float x) { top = fmaxf(top, x); }, x);
    top = at.max(top);
    at.columns([&](u32, float x) { total += power(x - top); }, x);
    return {at.sum(total), top};
}

ROW_KERNEL(softmax)(const T* x, T* y, u64 n, u32 d) {
    const Row<T> at(d);
    if (at.number >= n) return;
    const auto row = at.keep(at.of(x));
    const Exponentials e = exponentials(at, row);
    const float scale = 1.0f / e.total;
    at.columns([=](u32, float x, auto& y) { y = power(x - e.top) * scale; }, row, at.of(y));
}

ROW_KERNEL(softmax_grad)(const T* y, const T* dy, T* dx, u64 n, u32 d) {
    const Row<T> at(d);
    if (at.number >= n) return;
    const auto row = at.keep(at.of(y)), drow = at.keep(at.of(dy));
    float mean = 0.0f;
    at.columns([&](u32, float y, float dy) { mean += y * dy; }, row, drow);
    mean = at.sum(mean);
    at.columns([=](u32, float y, float dy, auto& dx) { dx = y * (dy - mean); }, row, drow, at.of(dx));
}

// ---- cross_entropy: loss of a row = ln Σ eˣ − x[target]; dx = weight·(softmax(x) − onehot(target))

ROW_KERNEL(cross_entropy)(const T* x, const u32* targets, T* dx, double* losses, u64 n, u32 d, float weight) {
    const Row<T> at(d);
    if (at.number >= n) return;
    const u32 target = targets[at.number];
    const auto row = at.keep(at.of(x));
    const Exponentials e = exponentials(at, row);
    const float scale = weight / e.total;
    auto f = [=](float x) { return power(x - e.top) * scale; };
    at.columns([=](u32, float x, auto& dx) { dx = f(x); }, row, at.of(dx));
    at.wait(); // the target's column is written
    if (at.lane == 0) {
        at.of(dx)[target] = f(row[target]) - weight;
        losses[at.number] = log((double)e.total) - (row[target] - e.top);
    }
}

// The mean of n losses. One block.
KERNEL_FOR(1024, mean_loss)(const double* losses, float* mean, u32 n) {
    const u32 ahead = 8; // that many are on their way
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += ahead * blockDim.x) {
        double some[ahead];
        #pragma unroll
        for (u32 a = 0; a < ahead; a++) some[a] = i + a * blockDim.x < n ? losses[i + a * blockDim.x] : 0.0;
        #pragma unroll
        for (u32 a = 0; a < ahead; a++) sum += some[a];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *mean = (float)(sum / n);
}

// ---- rms_norm: y = g ∘ x·s, s = 1/√(mean x² + eps)
//      dx = s·(g∘dy) − x·s³·mean(x ∘ g∘dy); dg = Σ_rows dy ∘ x·s

__device__ void rms_norm_of(const Row<T>& at, const T* x, const T* g, T* y, float* inv_rms, float eps) {
    const auto row = at.keep(at.of(x));
    float squares = 0.0f;
    at.columns([&](u32, float x) { squares += x * x; }, row);
    const float s = 1.0f / sqrtf(at.sum(squares) / at.d + eps);
    if (at.lane == 0) inv_rms[at.number] = s;
    at.columns([=](u32, float x, float g, auto& y) { y = g * x * s; }, row, g, at.of(y));
}

ROW_KERNEL(rms_norm)(const T* x, const T* g, T* y, float* inv_rms, u64 n, u32 d, float eps) {
    const Row<T> at(d);
    if (at.number < n) rms_norm_of(at, x, g, y, inv_rms, eps);
}

// sum = x + r, and of that as it is stored y. Who has added a column reads it back, out of the cache.
ROW_KERNEL(add_rms_norm)(const T* x, const T* r, const T* g, T* sum, T* y, float* inv_rms, u64 n, u32 d, float eps) {
    const Row<T> at(d);
    if (at.number >= n) return;
    at.columns([](u32, float x, float r, auto& sum) { sum = x + r; }, at.keep(at.of(x)), at.keep(at.of(r)), at.of(sum));
    rms_norm_of(at, sum, g, y, inv_rms, eps);
}

// A block takes `chunk` rows: writes dx, or if `adds` adds dx to what is there, and writes its part of dg, its row of sums [blocks, d].
// Rows taken side by side have a part of dg each in shared memory [sides, d]; the thread whose column it is adds to it.
KERNEL_FOR(128, rms_norm_grad)
(const T* x, const T* g, const float* inv_rms, const T* dy, T* dx, float* sums, u64 n, u32 d, u32 chunk, u32 adds) {
    Row<T, 6> at(d); // more of three rows at a time would take the registers of another block
    DYNAMIC_SHARED(parts);
    const u32 sides = blockDim.x / at.threads, side = threadIdx.x / at.threads;
    float* part = parts + side * d;
    at.columns([](u32, auto& part) { part = 0.0f; }, part);
    const u64 end = (blockIdx.x + 1ull) * chunk;
    for (at.number = (u64)blockIdx.x * chunk + side; at.number < end && at.number < n; at.number += sides) {
        const auto row = at.keep(at.of(x)), drow = at.keep(at.of(dy));
        const auto before = at.keep(at.of(adds ? dx : dy)); // there is always something to read
        const float s = inv_rms[at.number];
        float along = 0.0f;
        at.columns([&](u32, float x, float g, float dy) { along += x * (g * dy); }, row, g, drow);
        const float pull = at.sum(along) / d * s * s * s;
        auto f = [=](u32, float x, float g, float dy, float before, float sum, auto& dx, auto& part) {
            dx = (adds ? before : 0.0f) + (g * dy * s - x * pull);
            part = sum + dy * x * s;
        };
        at.columns(f, row, g, drow, before, (const float*)part, at.of(dx), part);
    }
    __syncthreads(); // all parts are whole
    for (u32 c = threadIdx.x; c < d; c += blockDim.x) {
        float sum = parts[c];
        for (u32 k = 1; k < sides; k++) sum += parts[k * d + c];
        sums[(u64)blockIdx.x * d + c] = sum;
    }
}

// ---- layer_norm: z = (x − mean)·s, s = 1/√(var + eps), y = g ∘ z + b; stats are mean and s
//      dx = s·(g∘dy − mean(g∘dy) − z·mean(z ∘ g∘dy)); dg = Σ_rows dy ∘ z; db = Σ_rows dy: layer_norm_gain, sum_rows below

ROW_KERNEL(layer_norm)(const T* x, const T* g, const T* b, T* y, float* stats, u64 n, u32 d, float eps) {
    const Row<T> at(d);
    if (at.number >= n) return;
    const auto row = at.keep(at.of(x));
    float sum = 0.0f, squares = 0.0f;
    at.columns([&](u32, float x) { sum += x; }, row);
    const float mean = at.sum(sum) / d;
    at.columns([&](u32, float x) { squares += (x - mean) * (x - mean); }, row);
    const float s = 1.0f / sqrtf(at.sum(squares) / d + eps);
    if (at.lane == 0) stats[2 * at.number] = mean, stats[2 * at.number + 1] = s;
    auto f = [=](u32, float x, float g, float b, auto& y) { y = g * (x - mean) * s + b; };
    at.columns(f, row, g, b, at.of(y));
}

ROW_KERNEL(layer_norm_grad)(const T* x, const T* g, const float* stats, const T* dy, T* dx, u64 n, u32 d) {
    const Row<T> at(d);
    if (at.number >= n) return;
    const auto row = at.keep(at.of(x)), drow = at.keep(at.of(dy));
    const float mean = stats[2 * at.number], s = stats[2 * at.number + 1];
    float sum = 0.0f, along = 0.0f;
    auto f = [&](u32, float x, float g, float dy) {
        const float gdy = g * dy;
        sum += gdy;
        along += (x - mean) * s * gdy;
    };
    at.columns(f, row, g, drow);
    const float mean_gdy = at.sum(sum) / d, mean_along = at.sum(along) / d;
    auto out = [=](u32, float x, float g, float dy, auto& dx) {
        dx = s * (g * dy - mean_gdy - (x - mean) * s * mean_along);
    };
    at.columns(out, row, g, drow, at.of(dx));
}

// ---- sums over the rows of a [n, d]: y [chunks, d], row k the sum of rows k·chunk … (k + 1)·chunk − 1 of the input. A second
//      launch over y, of sum_rows_f32, adds up the chunks.

// Σ of term(row, its elements of the tensors x at one column) over the rows first … end − 1; row_of: which row of x a row is. A block
// of up to MOST threads has the columns of 32 packs, those with number `strip`; each of its warps takes every so many rows, and the
// warps are added in their order.
template <u32 MOST, class Term, class RowOf, class Y, class... X>
__device__ void column_sums(Term term, RowOf row_of, Y* y, u32 strip, u64 first, u64 end, u32 d, const X*... x) {
    const u32 W = 16 / sizeof(T);
    __shared__ float parts[W][MOST];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, base = strip * WARP * W;
    const bool wide = d % W == 0;
    auto column = [=](u32 j) { return base + (wide ? lane * W + j : j * WARP + lane); };
    float sums[W] = {};
    if (wide && column(0) < d) {
        for (u64 row = first + warp; row < end; row += AHEAD * warps) {
            auto rows = [&](auto... ahead) {
                #pragma unroll
                for (u32 a = 0; a < AHEAD; a++) {
                    if (row + a * warps >= end) break;
                    const u64 i = row_of(row + a * warps) * d + column(0);
                    (ahead.start(a, i), ...);
                }
                #pragma unroll
                for (u32 a = 0; a < AHEAD; a++) {
                    if (row + a * warps >= end) break;
                    #pragma unroll
                    for (u32 j = 0; j < W; j++) sums[j] += term(row + a * warps, ahead.packs[a][j]...);
                }
            };
            rows(Ahead<X, W>{x, {}}...);
        }
    } else if (!wide) {
        for (u64 row = first + warp; row < end; row += warps) {
            for (u32 j = 0; j < W; j++) {
                const u64 i = row_of(row) * d + column(j);
                if (column(j) < d) sums[j] += term(row, x[i]...);
            }
        }
    }
    for (u32 j = 0; j < W; j++) parts[j][threadIdx.x] = sums[j];
    __syncthreads();
    for (u32 j = warp; j < W; j += warps) {
        if (column(j) >= d) continue;
        float sum = parts[j][lane];
        for (u32 k = 1; k < warps; k++) sum += parts[j][k * WARP + lane];
        y[column(j)] = sum;
    }
}

// Those of the chunk that is blockIdx.y.
template <u32 MOST, class Term, class... X>
__device__ void chunk_sums(Term term, float* y, u64 n, u32 d, u32 chunk, const X*... x) {
    const u64 first = (u64)blockIdx.y * chunk, end = first + chunk < n ? first + chunk : n;
    column_sums<MOST>(term, [](u64 row) { return row; }, y + (u64)blockIdx.y * d, blockIdx.x, first, end, d, x...);
}

KERNEL_FOR(1024, sum_rows)(const T* x, float* y, u64 n, u32 d, u32 chunk) {
    chunk_sums<1024>([](u64, float x) { return x; }, y, n, d, chunk, x);
}

KERNEL(layer_norm_gain)(const T* x, const float* stats, const T* dy, float* y, u64 n, u32 d, u32 chunk) {
    auto term = [=](u64 row, float x, float dy) { return dy * (x - stats[2 * row]) * stats[2 * row + 1]; };
    chunk_sums<256>(term, y, n, d, chunk, x, dy);
}

// Row id of the table receives the rows of dy where that id stood. One blockIdx.x for each id, also those that do not occur: a graph has
// one grid. The host has sorted the positions by id, and those of an id are order[starts[id]] … order[starts[id + 1] − 1].
KERNEL_FOR(128, embedding_grad)(const T* dy, const u32* order, const u32* starts, T* dtable, u32 d) {
    const u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    T* y = dtable + (u64)blockIdx.x * d;
    if (first == end) { // the whole block
        const u32 columns = WARP * 16 / sizeof(T), begin = blockIdx.y * columns;
        for (u32 c = begin + threadIdx.x; c < begin + columns && c < d; c += blockDim.x) y[c] = 0.0f;
        return;
    }
    column_sums<128>([](u64, float dy) { return dy; }, [=](u64 k) { return (u64)order[k]; }, y, blockIdx.y, first, end, d, dy);
}

// ---- sums over everything: of each tensor of a batch, one f64 for each of its parts [tensors, parts of the largest], then the sum of
//      those. f64 squares of f32 are always in range. How a tensor is cut depends on its length alone. Grid: tensors, parts.

struct Whole {
    const T* x;
    u64 n, parts;
};

template <class Term> __device__ void part_sum(const Whole& whole, Term term, double* parts) {
    if (blockIdx.y >= whole.parts) return; // the whole block
    const u32 W = 16 / sizeof(T);
    const u64 packs = whole.n / W, threads = whole.parts * blockDim.x, thread = (u64)blockIdx.y * blockDim.x + threadIdx.x;
    double sum = 0.0;
    for (u64 k = thread; k < packs; k += AHEAD * threads) {
        Ahead<T, W> ahead = {whole.x, {}};
        #pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (k + a * threads < packs) ahead.start(a, (k + a * threads) * W);
        }
        #pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (k + a * threads >= packs) break;
            #pragma unroll
            for (u32 j = 0; j < W; j++) sum += term(ahead.packs[a][j]);
        }
    }
    for (u64 i = packs * W + thread; i < whole.n; i += threads) sum += term(whole.x[i]);
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
    for (u64 i = threadIdx.x; i < all[blockIdx.x].parts; i += blockDim.x) sum += parts[(u64)blockIdx.x * most + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// y = x/√square, or `other` where that is 0. Grid: tensors, parts. 1/‖x‖ may be no normal f32: in two factors then, the first being 1e±30.
struct Direction {
    T* y;
    const T *x, *other;
    u64 n;
};

KERNEL(normalised)(const Direction* all, const double* squares) {
    const Direction t = all[blockIdx.x];
    const double norm = sqrt(squares[blockIdx.x]);
    const float first = norm < 1e-30 ? 1e30f : norm > 1e30 ? 1e-30f : 1.0f, second = 1.0 / (norm * first);
    if (norm == 0.0) {
        each(thread_of_term(), t.n, [](float x, auto& y) { y = x; }, t.other, t.y);
    } else {
        each(thread_of_term(), t.n, [=](float x, auto& y) { y = x * first * second; }, t.x, t.y);
    }
}
