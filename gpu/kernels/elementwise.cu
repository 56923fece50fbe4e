// Kernels that look at one element at a time, gradients below their functions.

KERNEL(fill)(T* y, float value, u64 n) {
    FOR_EACH(i, n) y[i] = value;
}

// A batch has a grid of terms and parts of the longest.
template <class X, class Y> struct Term {
    Y* y;
    const X* x;
    float alpha, beta;
    u64 n;
};
#define FOR_TERM(i, n) \
    for (u64 i = (u64)blockIdx.y * blockDim.x + threadIdx.x; i < (n); i += (u64)gridDim.y * blockDim.x)

// Between bf16 and f32, the kernels of bf16; those of f32 copy.
KERNEL(widen)(const Term<T, float>* terms) {
    const Term<T, float> t = terms[blockIdx.x];
    FOR_TERM(i, t.n) t.y[i] = t.x[i];
}

KERNEL(narrow)(const Term<float, T>* terms) {
    const Term<float, T> t = terms[blockIdx.x];
    FOR_TERM(i, t.n) t.y[i] = t.x[i];
}

// y ← alpha·x + beta·y; y is not read if beta is 0.
KERNEL(axpby)(float alpha, const T* x, float beta, T* y, u64 n) {
    if (beta == 0.0f) {
        FOR_EACH(i, n) y[i] = alpha * x[i];
    } else {
        FOR_EACH(i, n) y[i] = alpha * x[i] + beta * y[i];
    }
}

// The same for each term of a batch.
KERNEL(axpby_each)(const Term<T, T>* terms) {
    const Term<T, T> t = terms[blockIdx.x];
    FOR_TERM(i, t.n) {
        const float x = t.alpha * t.x[i];
        t.y[i] = t.beta == 0.0f ? x : x + t.beta * t.y[i];
    }
}

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// `f` counts as the Rust enum Unary does: exp, log, tanh, relu, silu.
KERNEL(unary)(u32 f, const T* x, T* y, u64 n) {
    FOR_EACH(i, n) {
        const float a = x[i];
        y[i] = f == 0   ? expf(a)
               : f == 1 ? logf(a)
               : f == 2 ? tanhf(a)
               : f == 3 ? fmaxf(a, 0.0f)
                        : a * sigmoid(a);
    }
}

// f'(x)·dy
KERNEL(unary_grad)(u32 f, const T* x, const T* dy, T* dx, u64 n) {
    FOR_EACH(i, n) {
        const float a = x[i], t = tanhf(a), s = sigmoid(a);
        const float slope = f == 0   ? expf(a)
                            : f == 1 ? 1.0f / a
                            : f == 2 ? 1.0f - t * t
                            : f == 3 ? (a > 0.0f ? 1.0f : 0.0f)
                                     : s * (1.0f + a * (1.0f - s));
        dx[i] = slope * dy[i];
    }
}

// `f` counts as the Rust enum Binary does: add, sub, mul.
KERNEL(binary)(u32 f, const T* a, const T* b, T* y, u64 n) {
    FOR_EACH(i, n) y[i] = f == 0 ? a[i] + b[i] : f == 1 ? a[i] - b[i] : a[i] * b[i];
}

// y [n, d] = x [n, d] + b [d]; `n` counts elements.
KERNEL(add_row)(const T* x, const T* b, T* y, u64 n, u32 d) {
    FOR_EACH(i, n) y[i] = x[i] + b[i % d];
}

// Columns x_start… of x [rows, dx] over columns y_start… of y [rows, dy], `width` of them.
KERNEL(copy_cols)(const T* x, u32 dx, u32 x_start, T* y, u32 dy, u32 y_start, u32 width, u64 rows) {
    FOR_EACH(i, rows * width) {
        const u64 row = i / width, c = i % width;
        y[row * dy + y_start + c] = x[row * dx + x_start + c];
    }
}

// ---- swiglu: y = silu(a) ∘ b, silu(a) = a·σ(a)
//      da = dy ∘ b ∘ σ(a)·(1 + a·(1 − σ(a))); db = dy ∘ silu(a)

KERNEL(swiglu)(const T* a, const T* b, T* y, u64 n) {
    FOR_EACH(i, n) y[i] = a[i] * sigmoid(a[i]) * b[i];
}

KERNEL(swiglu_grad)(const T* a, const T* b, const T* dy, T* da, T* db, u64 n) {
    FOR_EACH(i, n) {
        const float s = sigmoid(a[i]);
        da[i] = dy[i] * b[i] * s * (1.0f + a[i] * (1.0f - s));
        db[i] = dy[i] * a[i] * s;
    }
}

// ---- rope: (a, b) ← (a·cos − b·sin, a·sin + b·cos) for each pair (i, i + h/2) of each head; sign −1 is the inverse, the gradient
//      x [rows, d], table [positions, h]: cosines, then sines

KERNEL(rope)(const T* x, const float* table, T* y, u64 rows, u32 d, u32 h, u32 len, u32 offset, float sign) {
    const u32 half = h / 2, pairs = d / 2;
    FOR_EACH(i, rows * pairs) {
        const u64 row = i / pairs;
        const u32 pair = i % pairs, head = pair / half, c = pair % half;
        const float* angle = table + (u64)(offset + row % len) * h;
        const float cosine = angle[c], sine = sign * angle[half + c];
        const u64 first = row * d + head * h + c;
        const float a = x[first], b = x[first + half];
        y[first] = a * cosine - b * sine;
        y[first + half] = a * sine + b * cosine;
    }
}

// ---- embedding: row i of y is row ids[i] of the table [v, d]

KERNEL(embedding)(const T* table, const u32* ids, T* y, u64 rows, u32 d) {
    FOR_EACH(i, rows * d) y[i] = table[(u64)ids[i / d] * d + i % d];
}

// Row id of the table receives the rows of dy where that id stood, added in their order. One block for each id that occurs: the
// host has sorted the positions by id, and those of occurrence k are order[starts[k]] … order[starts[k + 1] − 1].
KERNEL(embedding_grad)(const T* dy, const u32* ids, const u32* order, const u32* starts, T* dtable, u32 d) {
    const u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    T* out = dtable + (u64)ids[order[first]] * d;
    FOR_COLUMNS(c, d) {
        float sum = 0.0f;
        for (u32 k = first; k < end; k++) sum += dy[(u64)order[k] * d + c];
        out[c] = sum;
    }
}

// ---- adamw (Loshchilov & Hutter 2019, Algorithm 2): keep = 1 − lr·λ, rate = lr/bias1, c = 1 − β

KERNEL(adamw)(T* w, const T* g, T* m, T* v, float keep, float rate, float eps, float beta1, float c1, float beta2, float c2,
              float inv_bias2, u64 n) {
    FOR_EACH(i, n) {
        const float mean = beta1 * m[i] + c1 * g[i];
        const float square = beta2 * v[i] + c2 * g[i] * g[i];
        m[i] = mean;
        v[i] = square;
        w[i] = keep * w[i] - rate * mean / (sqrtf(square * inv_bias2) + eps);
    }
}
