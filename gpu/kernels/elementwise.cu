// Kernels that look at one element at a time, or at one row of a table; gradients below their functions.

KERNEL(fill)(T* y, float value, u64 n) {
    each(n, [=](auto& y) { y = value; }, y);
}

// A batch has a grid of terms and parts of the longest.
template <class X, class Y> struct Term {
    Y* y;
    const X* x;
    float alpha, beta;
    u64 n;
};
__device__ Thread thread_of_term() {
    return {(u64)blockIdx.y * blockDim.x + threadIdx.x, (u64)gridDim.y * blockDim.x};
}

// Between bf16 and f32, the kernels of bf16; those of f32 copy.
KERNEL(widen)(const Term<T, float>* terms) {
    const Term<T, float> t = terms[blockIdx.x];
    each(thread_of_term(), t.n, [](float x, auto& y) { y = x; }, t.x, t.y);
}

KERNEL(narrow)(const Term<float, T>* terms) {
    const Term<float, T> t = terms[blockIdx.x];
    each(thread_of_term(), t.n, [](float x, auto& y) { y = x; }, t.x, t.y);
}

// y ← alpha·x + beta·y; y is not read if beta is 0.
__device__ void add_scaled(Thread thread, float alpha, const T* x, float beta, T* y, u64 n) {
    if (beta == 0.0f) {
        each(thread, n, [=](float x, auto& y) { y = alpha * x; }, x, y);
    } else {
        each(thread, n, [=](float x, float before, auto& y) { y = alpha * x + beta * before; }, x, (const T*)y, y);
    }
}

KERNEL(axpby)(float alpha, const T* x, float beta, T* y, u64 n) { add_scaled(thread_of_grid(), alpha, x, beta, y, n); }

// The same for each term of a batch.
KERNEL(axpby_each)(const Term<T, T>* terms) {
    const Term<T, T> t = terms[blockIdx.x];
    add_scaled(thread_of_term(), t.alpha, t.x, t.beta, t.y, t.n);
}

// ---- Spectron's step: x ← beta·x − ρ·o for A and B of each pair in turn, alpha is η and `squares` has σ² of each of them. ρ is η/(σ_A + σ_B + 1),
//      or the largest for which ρ(σ_A + σ_B) + ρ² ≤ η (lowrank/radius.rs)
KERNEL(renormalised_step)(const Term<T, T>* terms, const double* squares, u32 exact) {
    const Term<T, T> t = terms[blockIdx.x];
    const u32 pair = blockIdx.x / 2 * 2;
    const double eta = t.alpha, s = sqrt(squares[pair]) + sqrt(squares[pair + 1]);
    const double under = exact ? s + sqrt(s * s + 4.0 * eta) : s + 1.0;
    const double rho = under == 0.0 ? 0.0 : (exact ? 2.0 * eta : eta) / under;
    add_scaled(thread_of_term(), (float)-rho, t.x, t.beta, t.y, t.n);
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
    each(n, [=](float a, float b, auto& y) { y = f == 0 ? a + b : f == 1 ? a - b : a * b; }, a, b, y);
}

// y [n, d] = x [n, d] + b [d]; `n` counts elements.
KERNEL(add_row)(const T* x, const T* b, T* y, u64 n, u32 d) {
    FOR_EACH(i, n) y[i] = x[i] + b[i % d];
}

// `rows` rows of `width` elements: x and y are the first of them, dx and dy lie between those below each other.
__device__ void copy_block(Thread thread, const T* x, u32 dx, T* y, u32 dy, u32 width, u32 rows) {
    for (u64 i = thread.number; i < (u64)rows * width; i += thread.count) {
        const u64 row = i / width, c = i % width;
        y[row * dy + c] = x[row * dx + c];
    }
}

KERNEL(copy_cols)(const T* x, u32 dx, T* y, u32 dy, u32 width, u32 rows) {
    copy_block(thread_of_grid(), x, dx, y, dy, width, rows);
}

// The same for each block of a batch.
struct Block {
    T* y;
    const T* x;
    u32 dy, dx, width, rows;
};
KERNEL(copy_cols_each)(const Block* blocks) {
    const Block b = blocks[blockIdx.x];
    copy_block(thread_of_term(), b.x, b.dx, b.y, b.dy, b.width, b.rows);
}

// ---- swiglu: y = silu(a) ∘ b, silu(a) = a·σ(a)
//      da = dy ∘ b ∘ σ(a)·(1 + a·(1 − σ(a))); db = dy ∘ silu(a)

KERNEL(swiglu)(const T* a, const T* b, T* y, u64 n) {
    each(n, [](float a, float b, auto& y) { y = a * sigmoid(a) * b; }, a, b, y);
}

KERNEL(swiglu_grad)(const T* a, const T* b, const T* dy, T* da, T* db, u64 n) {
    auto f = [](float a, float b, float dy, auto& da, auto& db) {
        const float s = sigmoid(a);
        da = dy * b * s * (1.0f + a * (1.0f - s));
        db = dy * a * s;
    };
    each(n, f, a, b, dy, da, db);
}

// ---- rope: (a, b) ← (a·cos − b·sin, a·sin + b·cos) for each pair (i, i + h/2) of each head; sign −1 is the inverse, the gradient
//      x [rows, d], table [positions, h]: cosines, then sines

ROW_KERNEL(rope)(const T* x, const float* table, T* y, u64 rows, u32 d, u32 h, u32 len, u32 offset, float sign) {
    const u32 half = h / 2, pairs = d / 2;
    const Row<T> at(d);
    if (at.number >= rows) return;
    const float* angle = table + (u64)(offset + at.number % len) * h;
    auto turn = [=](u32, float a, float b, float cosine, float sine, auto& first, auto& second) {
        first = a * cosine - b * (sign * sine);
        second = a * (sign * sine) + b * cosine;
    };
    x = at.of(x), y = at.of(y);
    const u32 width = half % at.W == 0 ? at.W : 1; // packs of pairs, or one at a time
    for (u32 pair = at.lane * width; pair < pairs; pair += at.threads * width) {
        const u32 c = pair % half, first = pair / half * h + c, second = first + half;
        if (width == 1) {
            turn(0, x[first], x[second], angle[c], angle[half + c], y[first], y[second]);
        } else {
            apply<at.W>(turn, neighbours<at.W>(x, first), neighbours<at.W>(x, second), neighbours<at.W>(angle, c),
                        neighbours<at.W>(angle, half + c), neighbours<at.W>(y, first), neighbours<at.W>(y, second));
        }
    }
}

// ---- embedding: row i of y is row ids[i] of the table [v, d]

ROW_KERNEL(embedding)(const T* table, const u32* ids, T* y, u64 rows, u32 d) {
    const Row<T> at(d);
    if (at.number >= rows) return;
    at.columns([](u32, float x, auto& y) { y = x; }, at.keep(table + (u64)ids[at.number] * d), at.of(y));
}

// ---- adamw (Loshchilov & Hutter 2019, Algorithm 2) for each of some tensors: keep = 1 − lr·λ, rate = lr/bias1, c = 1 − β

struct Update {
    T* w;
    const T* g;
    T *m, *v;
    float keep, rate;
    u64 n;
};
KERNEL(adamw)(const Update* updates, float eps, float beta1, float c1, float beta2, float c2, float inv_bias2) {
    const Update t = updates[blockIdx.x];
    auto f = [=](float g, float w, float m, float v, auto& w_, auto& m_, auto& v_) {
        const float mean = beta1 * m + c1 * g;
        const float square = beta2 * v + c2 * g * g;
        m_ = mean;
        v_ = square;
        w_ = t.keep * w - t.rate * mean / (sqrtf(square * inv_bias2) + eps);
    };
    each(thread_of_term(), t.n, f, t.g, (const T*)t.w, (const T*)t.m, (const T*)t.v, t.w, t.m, t.v);
}
