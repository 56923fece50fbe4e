//! The CPU backend: products in registers and caches, one-pass row kernels for the rest, rayon over both.
//!
//! Results do not depend on the number of threads: work is split at places that depend on shapes alone, or where the split
//! cannot change a rounding (see gemm.rs), and partial sums are added in a fixed order.

mod attention;
mod buffer;
mod gemm;
mod gemv;
mod ndarray;
mod rows;
mod sgemm;

pub use buffer::{Buffer, Pool};
pub use sgemm::{Product, dgemm, sgemm};

use super::{
    Accum, AdamWStep, AdamWUpdate, Attention, Axpby, Backend, Binary, Columns, Mat, Scalar, Shape, Tensor,
    Unary, apart,
};
use crate::lowrank::Radius;
use rayon::prelude::*;
use std::marker::PhantomData;

/// The processor, computing in `T` (f32 or f64).
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu<T>(PhantomData<T>);

/// Elements per task: long enough to hide a task's cost (about 1 µs), short enough to share out.
const GRAIN: usize = 16 * 1024;

/// Rows of width `d` per task.
fn rows_per_task(d: usize) -> usize {
    (GRAIN / d.max(1)).max(1)
}

/// Runs `f` compiled for the best instruction set of this processor. Write `simd(#[inline(always)] || …)`: a closure that is
/// not inlined here, and long ones are not by themselves, is compiled for the oldest one.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Asks for the cache line at `x`, if the processor can be asked.
#[inline(always)]
fn prefetch<T>(x: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint reads nothing
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(x.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// A tensor like `x` filled by `f(chunk of x, chunk of y)`, in parallel.
fn map<T: Scalar>(x: &Tensor<Cpu<T>>, f: impl Fn(&[T], &mut [T]) + Sync) -> Tensor<Cpu<T>> {
    let mut y = Tensor::scratch(x.device(), x.shape()); // like x
    let out = y.buffer_mut().par_chunks_mut(GRAIN);
    out.zip(x.buffer().par_chunks(GRAIN)).for_each(|(y, x)| {
        simd(
            #[inline(always)]
            || f(x, y),
        )
    });
    y
}

/// As [`map`], from two tensors of one shape.
fn map2<T: Scalar>(a: &Tensor<Cpu<T>>, b: &Tensor<Cpu<T>>, f: impl Fn(T, T) -> T + Sync) -> Tensor<Cpu<T>> {
    let mut y = Tensor::scratch(a.device(), a.shape()); // like a
    let inputs = a.buffer().par_chunks(GRAIN).zip(b.buffer().par_chunks(GRAIN));
    y.buffer_mut().par_chunks_mut(GRAIN).zip(inputs).for_each(|(y, (a, b))| {
        simd(
            #[inline(always)]
            || {
                for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                    *y = f(a, b);
                }
            },
        )
    });
    y
}

/// Σ f(x) in f64: chunks of fixed length, added in order.
fn reduce<T: Scalar>(x: &[T], f: impl Fn(f64) -> f64 + Sync) -> f64 {
    let sums: Vec<f64> = x
        .par_chunks(GRAIN)
        .map(|x| {
            simd(
                #[inline(always)]
                || rows::sum(x, |x| f(x.f64())),
            )
        })
        .collect();
    sums.iter().sum()
}

/// √Σx².
fn norm<T: Scalar>(x: &[T]) -> f64 {
    let squares = reduce(x, |x| x * x);
    // f64 squares of f32 values are always in range; those of f64 values may not be
    if (1e-200..1e200).contains(&squares) || squares.is_nan() {
        return squares.sqrt();
    }
    let max = x.iter().fold(0.0, |max: f64, x| max.max(x.f64().abs()));
    if max == 0.0 || max.is_infinite() {
        return max;
    }
    max * reduce(x, |x| (x / max) * (x / max)).sqrt()
}

impl<T: Scalar> Backend for Cpu<T> {
    type Elem = T;
    type Buffer = Buffer<T>;
    type Norms = Vec<f64>;
    type Wide = Self;
    type Narrow = Self;
    const ASYNCHRONOUS: bool = false;
    const WORKING_SET: usize = 1 << 18; // at most half of a core's second-level cache, ½ to 2 MiB

    fn upload(&self, host: Vec<T>) -> Buffer<T> {
        host.into()
    }
    fn download(&self, buffer: &Buffer<T>) -> Vec<T> {
        buffer.to_vec()
    }
    fn scratch(&self, len: usize) -> Buffer<T> {
        Buffer::scratch(len)
    }
    fn filled(&self, len: usize, value: f64) -> Buffer<T> {
        let mut buffer = Buffer::scratch(len);
        buffer.fill(T::of(value));
        buffer
    }
    fn wide(&self) -> Self {
        *self
    }
    fn narrower(&self) -> Self {
        *self
    }
    fn widen(xs: &[&Tensor<Self>]) -> Vec<Tensor<Self>> {
        xs.iter().copied().cloned().collect()
    }
    fn narrow(&self, xs: &[&Tensor<Self>]) -> Vec<Tensor<Self>> {
        xs.iter().copied().cloned().collect()
    }
    fn sync(&self) {} // every op returns when it is done

    fn gemm(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>], accum: Accum) {
        gemm::gemm(a, b, c, accum, false);
    }
    fn gemm_beside(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut Tensor<Self>, first: &[usize]) {
        gemm::gemm_beside(a, b, c, first);
    }
    fn gemm_symmetric(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>]) {
        gemm::gemm_symmetric(a, b, c);
    }

    fn gemm_wide(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>], accum: Accum) {
        Self::gemm(a, b, c, accum);
    }

    fn axpby(terms: Vec<Axpby<Self>>) {
        for (alpha, x, beta, y) in terms {
            let (alpha, beta) = (T::of(alpha), T::of(beta));
            let y = y.buffer_mut().par_chunks_mut(GRAIN);
            y.zip(x.buffer().par_chunks(GRAIN)).for_each(|(y, x)| {
                simd(
                    #[inline(always)]
                    || {
                        let pairs = y.iter_mut().zip(x);
                        if beta == T::zero() {
                            pairs.for_each(|(y, &x)| *y = alpha * x);
                        } else {
                            pairs.for_each(|(y, &x)| *y = alpha * x + beta * *y);
                        }
                    },
                )
            });
        }
    }

    fn sum(x: &Tensor<Self>) -> f64 {
        reduce(&x.buffer()[..x.len()], |x| x)
    }

    fn norms(xs: &[&Tensor<Self>]) -> Vec<f64> {
        xs.iter().map(|x| norm(&x.buffer()[..x.len()])).collect()
    }
    fn read(norms: &Vec<f64>) -> Vec<f64> {
        norms.clone()
    }

    fn normalised(xs: &[(&Tensor<Self>, &Tensor<Self>)]) -> Vec<Tensor<Self>> {
        let one = |&(x, other): &(&Tensor<Self>, &Tensor<Self>)| match x.norm() {
            0.0 => other.clone(),                                         // like x
            norm if (1e-30..1e30).contains(&norm) => x.scale(1.0 / norm), // like x
            norm => {
                // 1/‖x‖ may be no normal number of the element type: in two factors
                let nearer = x.scale(if norm < 1.0 { 1e30 } else { 1e-30 }); // like x
                nearer.scale(1.0 / nearer.norm()) // like x
            }
        };
        xs.iter().map(one).collect()
    }

    fn unary(f: Unary, x: &Tensor<Self>) -> Tensor<Self> {
        // a closure for each function, so that the choice is made once and the loop vectorises
        macro_rules! each {
            ($($f:ident),*) => {
                match f {
                    $(Unary::$f => map(x, |x, y| {
                        for (y, &x) in y.iter_mut().zip(x) {
                            *y = Unary::$f.value(x);
                        }
                    }),)*
                }
            };
        }
        each!(Exp, Log, Tanh, Relu, Silu)
    }
    fn unary_grad(f: Unary, x: &Tensor<Self>, dy: &Tensor<Self>) -> Tensor<Self> {
        macro_rules! each {
            ($($f:ident),*) => {
                match f {
                    $(Unary::$f => map2(x, dy, |x, dy| Unary::$f.slope(x) * dy),)*
                }
            };
        }
        each!(Exp, Log, Tanh, Relu, Silu)
    }

    fn binary(f: Binary, a: &Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        match f {
            Binary::Add => map2(a, b, |a, b| a + b),
            Binary::Sub => map2(a, b, |a, b| a - b),
            Binary::Mul => map2(a, b, |a, b| a * b),
        }
    }

    fn add_row(x: &Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
        let (d, b) = (x.cols(), b.buffer());
        rows::each(x.buffer(), y.buffer_mut(), d, |x, y| {
            for ((y, &x), &b) in y.iter_mut().zip(x).zip(b.iter()) {
                *y = x + b;
            }
        });
        y
    }
    fn sum_rows(x: &Tensor<Self>) -> Tensor<Self> {
        let d = x.cols();
        let sum = rows::sum_over_rows(x.rows(), d, |row, total| {
            let x = &x.buffer()[row * d..][..d];
            for (t, &x) in total.iter_mut().zip(x) {
                *t += x;
            }
        });
        Tensor::from_vec(x.device(), [d], sum) // [d]
    }

    fn copy_cols(xs: &[&Tensor<Self>], ys: &mut [&mut Tensor<Self>], copies: &[Columns]) {
        for &Columns { from: (x, x_start), to: (y, y_start), width } in copies {
            let (x, y) = (xs[x], &mut ys[y]);
            let (dx, dy, rows) = (x.cols().max(1), y.cols().max(1), rows_per_task(width));
            let from = x.buffer()[..x.len()].par_chunks(rows * dx);
            y.buffer_mut().par_chunks_mut(rows * dy).zip(from).for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(dy).zip(x.chunks_exact(dx)) {
                    y[y_start..][..width].copy_from_slice(&x[x_start..][..width]);
                }
            });
        }
    }

    fn softmax(x: &Tensor<Self>) -> Tensor<Self> {
        rows::softmax(x)
    }
    fn softmax_grad(y: &Tensor<Self>, dy: &Tensor<Self>) -> Tensor<Self> {
        rows::softmax_grad(y, dy)
    }
    fn rms_norm(x: &Tensor<Self>, g: &Tensor<Self>, eps: f64) -> (Tensor<Self>, Tensor<Self>) {
        rows::rms_norm(x, g, eps)
    }
    fn add_rms_norm(
        x: &Tensor<Self>,
        r: &Tensor<Self>,
        g: &Tensor<Self>,
        eps: f64,
    ) -> ([Tensor<Self>; 2], Tensor<Self>) {
        let sum = x.add(r); // like x
        let (y, inv_rms) = Self::rms_norm(&sum, g, eps); // like x, [n]
        ([sum, y], inv_rms)
    }
    fn rms_norm_grad(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        inv_rms: &Tensor<Self>,
        dy: &Tensor<Self>,
        before: Option<Tensor<Self>>,
    ) -> [Tensor<Self>; 2] {
        let [dx, dg] = rows::rms_norm_grad(x, g, inv_rms, dy); // [n, d], [d]
        let Some(mut sum) = before else { return [dx, dg] };
        sum.axpby(1.0, &dx, 1.0);
        [sum, dg]
    }
    fn layer_norm(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        b: &Tensor<Self>,
        eps: f64,
    ) -> (Tensor<Self>, Tensor<Self>) {
        rows::layer_norm(x, g, b, eps)
    }
    fn layer_norm_grad(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        stats: &Tensor<Self>,
        dy: &Tensor<Self>,
    ) -> [Tensor<Self>; 3] {
        rows::layer_norm_grad(x, g, stats, dy)
    }
    fn swiglu(gate: &Tensor<Self>, up: &Tensor<Self>) -> Tensor<Self> {
        rows::swiglu(gate, up)
    }
    fn swiglu_grad(gate: &Tensor<Self>, up: &Tensor<Self>, dy: &Tensor<Self>) -> [Tensor<Self>; 2] {
        rows::swiglu_grad(gate, up, dy)
    }
    fn embedding(table: &Tensor<Self>, ids: &[u32]) -> Tensor<Self> {
        rows::embedding(table, ids)
    }
    fn embedding_grad(shape: Shape, ids: &[u32], dy: &Tensor<Self>) -> Tensor<Self> {
        rows::embedding_grad(shape, ids, dy)
    }
    fn rope(
        x: &Tensor<Self>,
        table: &Tensor<Self>,
        len: usize,
        offset: usize,
        inverse: bool,
    ) -> Tensor<Self> {
        rows::rope(x, table, len, offset, inverse)
    }
    fn attention(
        q: &Tensor<Self>,
        k: &Tensor<Self>,
        v: &Tensor<Self>,
        how: Attention,
    ) -> (Tensor<Self>, Tensor<Self>) {
        attention::attention(q, k, v, how)
    }
    fn attention_grad(
        qkv: [&Tensor<Self>; 3],
        o: &Tensor<Self>,
        lse: &Tensor<Self>,
        dout: &Tensor<Self>,
        how: Attention,
    ) -> [Tensor<Self>; 3] {
        attention::attention_grad(qkv, o, lse, dout, how)
    }
    fn cross_entropy(logits: &Tensor<Self>, targets: &[u32], share: f64) -> (Tensor<Self>, Tensor<Self>) {
        let (loss, dx) = rows::cross_entropy(logits, targets); // [1], [n, v]
        (loss, if share == 1.0 { dx } else { dx.scale(share) })
    }

    fn renormalised_step(sigma: &Vec<f64>, radius: Radius, moves: Vec<Axpby<Self>>) {
        let one = |(k, (eta, o, beta, x))| {
            let [sigma_a, sigma_b] = [0, 1].map(|factor| sigma[k / 2 * 2 + factor]);
            (-radius.of(eta, sigma_a, sigma_b), o, beta, x)
        };
        Self::axpby(moves.into_iter().enumerate().map(one).collect());
    }

    fn adamw(step: AdamWStep, updates: Vec<AdamWUpdate<Self>>) {
        let AdamWStep { beta1, beta2, eps, bias1, bias2 } = step;
        let [b1, c1, b2, c2] = [beta1, 1.0 - beta1, beta2, 1.0 - beta2].map(T::of);
        let (eps, inv_bias2) = (T::of(eps), T::of(1.0 / bias2));
        for AdamWUpdate { w, g, moments: [m, v], lr, decay } in updates {
            let (keep, lr) = (T::of(1.0 - lr * decay), T::of(lr / bias1));
            let moments = m.buffer_mut().par_chunks_mut(GRAIN).zip(v.buffer_mut().par_chunks_mut(GRAIN));
            let inputs = g.buffer().par_chunks(GRAIN).zip(moments);
            w.buffer_mut().par_chunks_mut(GRAIN).zip(inputs).for_each(|(w, (g, (m, v)))| {
                simd(
                    #[inline(always)]
                    || {
                        for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                            *m = b1 * *m + c1 * g;
                            *v = b2 * *v + c2 * g * g;
                            *w = keep * *w - lr * *m / ((*v * inv_bias2).sqrt() + eps);
                        }
                    },
                )
            });
        }
    }
}
