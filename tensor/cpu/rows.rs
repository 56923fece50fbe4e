//! Kernels that work on one row (the last axis) at a time: each makes one pass over memory, and its gradient stands below it.
//!
//! Letters: n rows of d columns; dy gradient of y. Sums run in 16 lanes, so that they vectorise and are the same everywhere.

use super::{Cpu, Scalar, Shape, Tensor, rows_per_task, simd};
use rayon::prelude::*;

type Cpus<T> = Tensor<Cpu<T>>;

pub(super) const LANES: usize = 16;

/// Σ f(x).
#[inline(always)]
pub(super) fn sum<T: Copy, R: Scalar>(x: &[T], f: impl Fn(T) -> R) -> R {
    let mut lanes = [R::zero(); LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    fold(lanes)
}

/// Σ f(x, y) over two slices of one length.
#[inline(always)]
pub(super) fn sum2<T: Scalar>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder());
    for (x, y) in xs.zip(ys) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += f(x, y);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(rest) {
        *lane += f(x, y);
    }
    fold(lanes)
}

/// Adds the lanes pairwise.
#[inline(always)]
pub(super) fn fold<T: Scalar>(lanes: [T; LANES]) -> T {
    fold_by(lanes, |x, y| x + y)
}

/// Joins the lanes pairwise.
#[inline(always)]
fn fold_by<T: Scalar>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest element; NaN is passed over (it comes back through the exponentials).
#[inline(always)]
pub(super) fn max<T: Scalar>(x: &[T]) -> T {
    let greater = |x: T, y: T| if x > y { x } else { y };
    let mut lanes = [T::neg_infinity(); LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = greater(x, *lane);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = greater(x, *lane);
    }
    fold_by(lanes, greater)
}

/// `f(row of x, row of y)` for rows of width d.
pub(super) fn each<T: Scalar>(x: &[T], y: &mut [T], d: usize, f: impl Fn(&[T], &mut [T]) + Sync) {
    let run = rows_per_task(d) * d;
    y.par_chunks_mut(run).zip(x.par_chunks(run)).for_each(|(y, x)| {
        simd(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    f(x, y);
                }
            },
        )
    });
}

/// Σ over the n rows, where `f(row, total)` adds a row to a total of width d: fixed runs of rows, added in order.
pub(super) fn sum_over_rows<T: Scalar>(n: usize, d: usize, f: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let run = rows_per_task(d);
    let totals: Vec<Vec<T>> = (0..n.div_ceil(run))
        .into_par_iter()
        .map(|i| {
            let mut total = vec![T::zero(); d];
            simd(
                #[inline(always)]
                || (i * run..n.min((i + 1) * run)).for_each(|row| f(row, &mut total)),
            );
            total
        })
        .collect();
    totals
        .into_iter()
        .reduce(|mut a, b| {
            add(&mut a, &b);
            a
        })
        .unwrap_or_else(|| vec![T::zero(); d])
}

#[inline(always)]
fn add<T: Scalar>(total: &mut [T], x: &[T]) {
    for (t, &x) in total.iter_mut().zip(x) {
        *t += x;
    }
}

// ---- softmax: y = eˣ / Σ eˣ; dx = y ∘ (dy − y·dy)

pub(super) fn softmax<T: Scalar>(x: &Cpus<T>) -> Cpus<T> {
    let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
    each(x.buffer(), y.buffer_mut(), x.cols(), |x, y| {
        let top = max(x);
        for (y, &x) in y.iter_mut().zip(x) {
            *y = (x - top).fast_exp();
        }
        let scale = T::one() / sum(y, |y| y);
        y.iter_mut().for_each(|y| *y *= scale);
    });
    y
}

pub(super) fn softmax_grad<T: Scalar>(y: &Cpus<T>, dy: &Cpus<T>) -> Cpus<T> {
    let (d, mut dx) = (y.cols(), dy.clone()); // [n, d]
    each(y.buffer(), dx.buffer_mut(), d, |y, dx| {
        let mean = sum2(y, dx, |y, dy| y * dy);
        for (dx, &y) in dx.iter_mut().zip(y) {
            *dx = y * (*dx - mean);
        }
    });
    dx
}

// ---- rms_norm: y = g ∘ x·s, s = 1/√(mean x² + eps)
//      dx = s·(g∘dy) − x·s³·mean(x ∘ g∘dy); dg = Σ_rows dy ∘ x·s

pub(super) fn rms_norm<T: Scalar>(x: &Cpus<T>, g: &Cpus<T>, eps: f64) -> (Cpus<T>, Cpus<T>) {
    let (n, d) = (x.rows(), x.cols());
    let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
    let mut inv_rms = Tensor::scratch(x.device(), [n]); // [n]
    let (g, eps, inv_d) = (g.buffer(), T::of(eps), T::of(1.0 / d as f64));
    let run = rows_per_task(d);
    let out = y.buffer_mut().par_chunks_mut(run * d).zip(inv_rms.buffer_mut().par_chunks_mut(run));
    out.zip(x.buffer().par_chunks(run * d)).for_each(|((y, s), x)| {
        simd(
            #[inline(always)]
            || {
                for ((y, s), x) in y.chunks_exact_mut(d).zip(s).zip(x.chunks_exact(d)) {
                    *s = T::one() / (sum(x, |x| x * x) * inv_d + eps).sqrt();
                    for ((y, &x), &g) in y.iter_mut().zip(x).zip(g.iter()) {
                        *y = g * x * *s;
                    }
                }
            },
        )
    });
    (y, inv_rms)
}

pub(super) fn rms_norm_grad<T: Scalar>(
    x: &Cpus<T>,
    g: &Cpus<T>,
    inv_rms: &Cpus<T>,
    dy: &Cpus<T>,
) -> [Cpus<T>; 2] {
    let (n, d) = (x.rows(), x.cols());
    let mut dx = Tensor::scratch(x.device(), x.shape()); // [n, d]
    let (x, g, s, dy) = (x.buffer(), g.buffer(), inv_rms.buffer(), dy.buffer());
    let inv_d = T::of(1.0 / d as f64);
    let run = rows_per_task(d);
    let totals: Vec<Vec<T>> = dx
        .buffer_mut()
        .par_chunks_mut(run * d)
        .enumerate()
        .map(|(i, dx)| {
            let mut dg = vec![T::zero(); d];
            simd(
                #[inline(always)]
                || {
                    for (row, dx) in (i * run..).zip(dx.chunks_exact_mut(d)) {
                        let (x, dy, s) = (&x[row * d..][..d], &dy[row * d..][..d], s[row]);
                        for ((dx, &g), &dy) in dx.iter_mut().zip(g.iter()).zip(dy) {
                            *dx = g * dy;
                        }
                        let pull = sum2(x, dx, |x, gdy| x * gdy) * inv_d * s * s * s;
                        for (((dx, &x), &dy), dg) in dx.iter_mut().zip(x).zip(dy).zip(&mut dg) {
                            *dx = *dx * s - x * pull;
                            *dg += dy * x * s;
                        }
                    }
                },
            );
            dg
        })
        .collect();
    debug_assert_eq!(totals.len(), n.div_ceil(run));
    let mut dg = vec![T::zero(); d];
    totals.iter().for_each(|total| add(&mut dg, total));
    let dg = Tensor::from_vec(dx.device(), [d], dg); // [d]
    [dx, dg]
}

// ---- layer_norm: z = (x − mean)·s, s = 1/√(var + eps), y = g ∘ z + b
//      dx = s·(g∘dy − mean(g∘dy) − z·mean(z ∘ g∘dy)); dg = Σ_rows dy ∘ z; db = Σ_rows dy

pub(super) fn layer_norm<T: Scalar>(x: &Cpus<T>, g: &Cpus<T>, b: &Cpus<T>, eps: f64) -> (Cpus<T>, Cpus<T>) {
    let (n, d) = (x.rows(), x.cols());
    let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
    let mut stats = Tensor::scratch(x.device(), [n, 2]); // [n, 2]
    let (g, b, eps, inv_d) = (g.buffer(), b.buffer(), T::of(eps), T::of(1.0 / d as f64));
    let run = rows_per_task(d);
    let out = y.buffer_mut().par_chunks_mut(run * d).zip(stats.buffer_mut().par_chunks_mut(run * 2));
    out.zip(x.buffer().par_chunks(run * d)).for_each(|((y, stats), x)| {
        simd(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(d).zip(stats.chunks_exact_mut(2)).zip(x.chunks_exact(d));
                for ((y, stats), x) in rows {
                    let mean = sum(x, |x| x) * inv_d;
                    let variance = sum(x, |x| (x - mean) * (x - mean)) * inv_d;
                    let s = T::one() / (variance + eps).sqrt();
                    stats.copy_from_slice(&[mean, s]);
                    for (((y, &x), &g), &b) in y.iter_mut().zip(x).zip(g.iter()).zip(b.iter()) {
                        *y = g * (x - mean) * s + b;
                    }
                }
            },
        )
    });
    (y, stats)
}

pub(super) fn layer_norm_grad<T: Scalar>(
    x: &Cpus<T>,
    g: &Cpus<T>,
    stats: &Cpus<T>,
    dy: &Cpus<T>,
) -> [Cpus<T>; 3] {
    let (n, d) = (x.rows(), x.cols());
    let mut dx = Tensor::scratch(x.device(), x.shape()); // [n, d]
    let device = x.device();
    let (x, g, stats, dy) = (x.buffer(), g.buffer(), stats.buffer(), dy.buffer());
    let inv_d = T::of(1.0 / d as f64);
    let run = rows_per_task(d);
    dx.buffer_mut().par_chunks_mut(run * d).enumerate().for_each(|(i, dx)| {
        simd(
            #[inline(always)]
            || {
                for (row, dx) in (i * run..).zip(dx.chunks_exact_mut(d)) {
                    let (x, dy) = (&x[row * d..][..d], &dy[row * d..][..d]);
                    let (mean, s) = (stats[2 * row], stats[2 * row + 1]);
                    for ((dx, &g), &dy) in dx.iter_mut().zip(g.iter()).zip(dy) {
                        *dx = g * dy;
                    }
                    let mean_dx = sum(dx, |gdy| gdy) * inv_d;
                    let along = sum2(x, dx, |x, gdy| (x - mean) * s * gdy) * inv_d;
                    for (dx, &x) in dx.iter_mut().zip(x) {
                        *dx = s * (*dx - mean_dx - (x - mean) * s * along);
                    }
                }
            },
        )
    });
    let dg = sum_over_rows(n, d, |row, total| {
        let (x, dy) = (&x[row * d..][..d], &dy[row * d..][..d]);
        let (mean, s) = (stats[2 * row], stats[2 * row + 1]);
        for ((t, &x), &dy) in total.iter_mut().zip(x).zip(dy) {
            *t += dy * (x - mean) * s;
        }
    });
    let db = sum_over_rows(n, d, |row, total| add(total, &dy[row * d..][..d]));
    let dg = Tensor::from_vec(device, [d], dg); // [d]
    let db = Tensor::from_vec(device, [d], db); // [d]
    [dx, dg, db]
}

// ---- swiglu: y = silu(a) ∘ b, silu(a) = a·σ(a)
//      da = dy ∘ b ∘ σ(a)·(1 + a·(1 − σ(a))); db = dy ∘ silu(a)

pub(super) fn swiglu<T: Scalar>(gate: &Cpus<T>, up: &Cpus<T>) -> Cpus<T> {
    super::map2(gate, up, |a, b| a / (T::one() + (-a).fast_exp()) * b)
}

pub(super) fn swiglu_grad<T: Scalar>(gate: &Cpus<T>, up: &Cpus<T>, dy: &Cpus<T>) -> [Cpus<T>; 2] {
    let mut da = Tensor::scratch(gate.device(), gate.shape()); // [n, f]
    let mut db = Tensor::scratch(gate.device(), gate.shape()); // [n, f]
    let run = super::GRAIN;
    let out = da.buffer_mut().par_chunks_mut(run).zip(db.buffer_mut().par_chunks_mut(run));
    let inputs = gate.buffer().par_chunks(run).zip(up.buffer().par_chunks(run));
    out.zip(inputs.zip(dy.buffer().par_chunks(run))).for_each(|((da, db), ((a, b), dy))| {
        simd(
            #[inline(always)]
            || {
                let inputs = a.iter().zip(b).zip(dy);
                for ((da, db), ((&a, &b), &dy)) in da.iter_mut().zip(db).zip(inputs) {
                    let s = T::one() / (T::one() + (-a).fast_exp());
                    *da = dy * b * s * (T::one() + a * (T::one() - s));
                    *db = dy * a * s;
                }
            },
        )
    });
    [da, db]
}

// ---- embedding: row i of y is row ids[i] of the table; the gradient adds row i of dy to row ids[i]

pub(super) fn embedding<T: Scalar>(table: &Cpus<T>, ids: &[u32]) -> Cpus<T> {
    let (d, table, device) = (table.cols(), table.buffer(), table.device());
    let mut y = Tensor::scratch(device, [ids.len(), d]); // [ids, d]
    for (y, &id) in y.buffer_mut().chunks_exact_mut(d).zip(ids) {
        y.copy_from_slice(&table[id as usize * d..][..d]);
    }
    y
}

pub(super) fn embedding_grad<T: Scalar>(shape: Shape, ids: &[u32], dy: &Cpus<T>) -> Cpus<T> {
    let d = shape.cols();
    let mut dtable = Tensor::zeros(dy.device(), shape); // [v, d]
    let out = dtable.buffer_mut();
    simd(
        #[inline(always)]
        || {
            for (dy, &id) in dy.buffer().chunks_exact(d).zip(ids) {
                add(&mut out[id as usize * d..][..d], dy);
            }
        },
    );
    dtable
}

// ---- rope: (a, b) ← (a·cos − b·sin, a·sin + b·cos) for each pair (i, i + h/2); the gradient is the inverse rotation

pub(super) fn rope<T: Scalar>(
    x: &Cpus<T>,
    table: &Cpus<T>,
    len: usize,
    offset: usize,
    inverse: bool,
) -> Cpus<T> {
    let (d, h) = (x.cols(), table.cols());
    let (half, table) = (h / 2, table.buffer());
    let sign = if inverse { -T::one() } else { T::one() };
    let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
    let run = rows_per_task(d);
    let tasks = y.buffer_mut().par_chunks_mut(run * d).zip(x.buffer().par_chunks(run * d));
    tasks.enumerate().for_each(|(i, (y, x))| {
        simd(
            #[inline(always)]
            || {
                for (row, (y, x)) in (i * run..).zip(y.chunks_exact_mut(d).zip(x.chunks_exact(d))) {
                    let (cos, sin) = table[(offset + row % len) * h..][..h].split_at(half);
                    for (y, x) in y.chunks_exact_mut(h).zip(x.chunks_exact(h)) {
                        let ((ya, yb), (xa, xb)) = (y.split_at_mut(half), x.split_at(half));
                        let turn = |a: T, b: T, cos: T, sin: T| {
                            let sin = sign * sin;
                            [a * cos - b * sin, a * sin + b * cos]
                        };
                        let whole = half - half % LANES;
                        for at in (0..whole).step_by(LANES) {
                            // by value: the compiler need not ask whether what is written is read again; and in loops, since what an array's
                            // `map` calls is at times compiled apart, for the oldest processor
                            let mut values = [[T::zero(); LANES]; 4];
                            for (values, x) in values.iter_mut().zip([xa, xb, cos, sin]) {
                                *values = *x[at..].first_chunk::<LANES>().expect("a whole vector");
                            }
                            let [a, b, cos, sin] = values;
                            let [mut first, mut second] = [[T::zero(); LANES]; 2];
                            for i in 0..LANES {
                                [first[i], second[i]] = turn(a[i], b[i], cos[i], sin[i]);
                            }
                            ya[at..at + LANES].copy_from_slice(&first);
                            yb[at..at + LANES].copy_from_slice(&second);
                        }
                        for i in whole..half {
                            [ya[i], yb[i]] = turn(xa[i], xb[i], cos[i], sin[i]);
                        }
                    }
                }
            },
        )
    });
    y
}

// ---- cross_entropy: loss = mean over rows of ln Σ eˣ − x[target]; dx = (softmax(x) − onehot(target)) / n

pub(super) fn cross_entropy<T: Scalar>(logits: &Cpus<T>, targets: &[u32]) -> (Cpus<T>, Cpus<T>) {
    let (n, v) = (logits.rows(), logits.cols());
    let mut dx = Tensor::scratch(logits.device(), logits.shape()); // [n, v]
    let inv_n = T::of(1.0 / n as f64);
    let run = rows_per_task(v);
    let tasks = dx.buffer_mut().par_chunks_mut(run * v).zip(logits.buffer().par_chunks(run * v));
    let losses: Vec<f64> = tasks
        .zip(targets.par_chunks(run))
        .map(|((dx, x), targets)| {
            simd(
                #[inline(always)]
                || {
                    let mut loss = 0.0;
                    for ((dx, x), &target) in dx.chunks_exact_mut(v).zip(x.chunks_exact(v)).zip(targets) {
                        let top = max(x);
                        for (dx, &x) in dx.iter_mut().zip(x) {
                            *dx = (x - top).fast_exp();
                        }
                        let total = sum(dx, |e| e);
                        let scale = inv_n / total;
                        dx.iter_mut().for_each(|dx| *dx *= scale);
                        dx[target as usize] -= inv_n;
                        loss += total.f64().ln() - (x[target as usize] - top).f64();
                    }
                    loss
                },
            )
        })
        .collect();
    let loss = losses.iter().sum::<f64>() / n as f64;
    let loss = Tensor::full(logits.device(), [1], loss); // [1]
    (loss, dx)
}
