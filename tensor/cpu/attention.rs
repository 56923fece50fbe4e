//! Softmax attention, forward and backward, over blocks of queries: scores exist for one block at a time, and none are
//! computed above the diagonal's block. Only the log-sum-exp of each query is kept; the backward recomputes probabilities
//! from it (Dao et al. 2022, arXiv 2205.14135, section 3).
//!
//! Letters: tq, tk query and key lengths; h head size; S scores, P probabilities, O output, each for one block of one head.
//! Parallel over (sequence, key/value head): the query heads of a group run in turn, so dK and dV are summed in a fixed order.

use super::{Accum, Attention, Buffer, Cpu, Product, Scalar, Tensor, rows, simd};
use rayon::prelude::*;

type Cpus<T> = Tensor<Cpu<T>>;

/// Queries per block: enough rows for the matrix product, few enough to waste little above the diagonal.
const BLOCK: usize = 32;

/// One head of a tensor [tokens, heads·h]: its first element and the distance between rows.
#[derive(Clone, Copy)]
struct Head<P> {
    first: P,
    stride: isize,
}
// SAFETY: tasks write disjoint heads of the outputs, and only read the inputs
unsafe impl<P> Send for Head<P> {}
unsafe impl<P> Sync for Head<P> {}

impl<T> Head<*const T> {
    fn of(x: &[T], width: usize) -> Self {
        Self { first: x.as_ptr(), stride: width as isize }
    }

    /// From `row` and column `col` on; both must lie inside the tensor.
    fn at(self, row: usize, col: usize) -> Self {
        let first = self.first.wrapping_offset(row as isize * self.stride + col as isize);
        Self { first, ..self }
    }
}
impl<T> Head<*mut T> {
    fn of_mut(x: &mut [T], width: usize) -> Self {
        Self { first: x.as_mut_ptr(), stride: width as isize }
    }

    /// From `row` and column `col` on; both must lie inside the tensor.
    fn at(self, row: usize, col: usize) -> Self {
        let first = self.first.wrapping_offset(row as isize * self.stride + col as isize);
        Self { first, ..self }
    }
}

/// All elements of `x`, which has the shape of `like`; the slice refuses a buffer shorter than that.
fn whole<'a, T: Scalar>(x: &'a Cpus<T>, like: &Cpus<T>) -> &'a [T] {
    assert!(x.shape() == like.shape(), "attention: {} in place of {}", x.shape(), like.shape());
    &x.buffer()[..x.len()]
}

/// C ← or += A·B, where `ta`/`tb` read A/B transposed; sizes m, k, n.
///
/// # Safety
/// The operands must hold the rows that the sizes ask for, and nothing else may touch C meanwhile.
unsafe fn product<T: Scalar>(
    sizes: [usize; 3],
    (a, ta): (Head<*const T>, bool),
    (b, tb): (Head<*const T>, bool),
    accum: Accum,
    c: Head<*mut T>,
) {
    let strides =
        |x: Head<*const T>, t: bool| if t { (x.first, 1, x.stride) } else { (x.first, x.stride, 1) };
    let (a, b, c) = (strides(a, ta), strides(b, tb), (c.first, c.stride));
    // SAFETY: the caller's promise
    unsafe { T::gemm(Product { sizes, a, b, accum, c, lower: None }) }
}

/// Sizes shared by forward and backward.
struct Sizes {
    tq: usize,
    tk: usize,
    h: usize,
    group: usize,
    scale: f64,
    how: Attention,
}

impl Sizes {
    fn new<T: Scalar>(q: &Cpus<T>, k: &Cpus<T>, how: Attention) -> Self {
        let h = q.cols() / how.heads;
        // what the unsafe products below rely on; callers have said it in their own words
        assert!(q.cols() == how.heads * h && k.cols() == how.kv_heads * h, "attention: head sizes");
        assert!(how.heads.is_multiple_of(how.kv_heads), "attention: head groups");
        assert!(q.rows().is_multiple_of(how.batch) && k.rows().is_multiple_of(how.batch), "attention: batch");
        assert!(!how.causal || k.rows() >= q.rows(), "attention: causal lengths");
        Self {
            tq: q.rows() / how.batch,
            tk: k.rows() / how.batch,
            h,
            group: how.heads / how.kv_heads,
            scale: 1.0 / (h as f64).sqrt(),
            how,
        }
    }

    /// (first query, queries, keys that the last of them sees) of each block.
    fn blocks(&self) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> + '_ {
        (0..self.tq.div_ceil(BLOCK)).map(|i| {
            let start = i * BLOCK;
            let rows = BLOCK.min(self.tq - start);
            (start, rows, self.keys_of(start + rows - 1))
        })
    }

    /// Number of keys that query `i` sees.
    fn keys_of(&self, i: usize) -> usize {
        if self.how.causal { i + 1 + self.tk - self.tq } else { self.tk }
    }

    /// Runs `f(sequence, key/value head)` for all of them.
    fn for_each(&self, f: impl Fn(usize, usize) + Sync) {
        let kv = self.how.kv_heads;
        (0..self.how.batch * kv).into_par_iter().for_each(|task| f(task / kv, task % kv));
    }
}

pub(super) fn attention<T: Scalar>(q: &Cpus<T>, k: &Cpus<T>, v: &Cpus<T>, how: Attention) -> [Cpus<T>; 2] {
    let z = Sizes::new(q, k, how);
    let (h, scale) = (z.h, T::of(z.scale));
    let mut o = Tensor::scratch(q.device(), q.shape()); // [batch·tq, heads·h]
    let mut lse = Tensor::scratch(q.device(), [how.batch, how.heads, z.tq]); // [batch, heads, tq]
    let qs = Head::of(whole(q, q), q.cols());
    let (ks, vs) = (Head::of(whole(k, k), k.cols()), Head::of(whole(v, k), v.cols()));
    let os = Head::of_mut(o.buffer_mut(), q.cols());
    let lses = Head::of_mut(lse.buffer_mut(), z.tq);
    z.for_each(|b, kv| {
        let (k, v) = (ks.at(b * z.tk, kv * h), vs.at(b * z.tk, kv * h));
        let mut scores = Buffer::scratch(BLOCK * z.tk); // [BLOCK, tk]
        for j in kv * z.group..(kv + 1) * z.group {
            for (start, rows, keys) in z.blocks() {
                let (q, o) = (qs.at(b * z.tq + start, j * h), os.at(b * z.tq + start, j * h));
                let s = Head::of_mut(&mut scores, keys);
                // S = Q·Kᵀ
                // SAFETY: the block's queries, its visible keys and the scratch all hold these sizes
                unsafe { product([rows, h, keys], (q, false), (k, true), Accum::Replace, s) };
                // SAFETY: this task alone writes this head's log-sum-exps
                let lse =
                    unsafe { std::slice::from_raw_parts_mut(lses.at(b * how.heads + j, start).first, rows) };
                simd(
                    #[inline(always)]
                    || {
                        for (i, (row, lse)) in scores.chunks_exact_mut(keys).zip(lse).enumerate() {
                            let (seen, hidden) = row.split_at_mut(z.keys_of(start + i));
                            let top = rows::max(seen);
                            for s in seen.iter_mut() {
                                *s = ((*s - top) * scale).fast_exp();
                            }
                            let total = rows::sum(seen, |p| p);
                            *lse = top * scale + total.ln();
                            seen.iter_mut().for_each(|p| *p /= total);
                            hidden.fill(T::zero());
                        }
                    },
                );
                let p = Head::of(&scores, keys); // P [rows, keys]
                // O = P·V
                // SAFETY: as above; this task alone writes this head of O
                unsafe { product([rows, keys, h], (p, false), (v, false), Accum::Replace, o) };
            }
        }
    });
    [o, lse]
}

/// dP = dO·Vᵀ, dS = scale·P∘(dP − rowsum(dO∘O)); dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dO.
pub(super) fn attention_grad<T: Scalar>(
    [q, k, v]: [&Cpus<T>; 3],
    o: &Cpus<T>,
    lse: &Cpus<T>,
    dout: &Cpus<T>,
    how: Attention,
) -> [Cpus<T>; 3] {
    let z = Sizes::new(q, k, how);
    let (h, scale) = (z.h, T::of(z.scale));
    let mut dq = Tensor::scratch(q.device(), q.shape()); // [batch·tq, heads·h]
    let mut dk = Tensor::scratch(k.device(), k.shape()); // [batch·tk, kv_heads·h]
    let mut dv = Tensor::scratch(v.device(), v.shape()); // [batch·tk, kv_heads·h]
    let (qs, dos) = (Head::of(whole(q, q), q.cols()), Head::of(whole(dout, q), q.cols()));
    let (ks, vs) = (Head::of(whole(k, k), k.cols()), Head::of(whole(v, k), v.cols()));
    let dqs = Head::of_mut(dq.buffer_mut(), q.cols());
    let dks = Head::of_mut(dk.buffer_mut(), k.cols());
    let dvs = Head::of_mut(dv.buffer_mut(), v.cols());
    let (o, lse, dout) = (o.buffer(), lse.buffer(), dout.buffer());
    z.for_each(|b, kv| {
        let (k, v) = (ks.at(b * z.tk, kv * h), vs.at(b * z.tk, kv * h));
        let (dk, dv) = (dks.at(b * z.tk, kv * h), dvs.at(b * z.tk, kv * h));
        let mut probs = Buffer::scratch(BLOCK * z.tk); // [BLOCK, tk]
        let mut dprobs = Buffer::scratch(BLOCK * z.tk); // [BLOCK, tk]
        // the last block sees every key, so it comes first and replaces what dK and dV held; the others add
        let mut accum = Accum::Replace;
        for j in kv * z.group..(kv + 1) * z.group {
            for (start, rows, keys) in z.blocks().rev() {
                let row0 = b * z.tq + start;
                let (q, do_) = (qs.at(row0, j * h), dos.at(row0, j * h));
                let dq = dqs.at(row0, j * h);
                let (p, dp) = (Head::of_mut(&mut probs, keys), Head::of_mut(&mut dprobs, keys));
                // SAFETY: the block's queries, its visible keys and the scratch all hold these sizes
                unsafe {
                    product([rows, h, keys], (q, false), (k, true), Accum::Replace, p); // S [rows, keys]
                    product([rows, h, keys], (do_, false), (v, true), Accum::Replace, dp); // dP [rows, keys]
                }
                simd(
                    #[inline(always)]
                    || {
                        let pairs = probs.chunks_exact_mut(keys).zip(dprobs.chunks_exact_mut(keys));
                        for (i, (p, dp)) in pairs.take(rows).enumerate() {
                            let at = (row0 + i) * how.heads * h + j * h;
                            let pull = rows::sum2(&o[at..][..h], &dout[at..][..h], |o, d| o * d);
                            let lse = lse[(b * how.heads + j) * z.tq + start + i];
                            let seen = z.keys_of(start + i);
                            for (p, dp) in p[..seen].iter_mut().zip(&mut dp[..seen]) {
                                *p = (*p * scale - lse).fast_exp();
                                *dp = *p * (*dp - pull) * scale;
                            }
                            p[seen..].fill(T::zero());
                            dp[seen..].fill(T::zero());
                        }
                    },
                );
                let (p, dp) = (Head::of(&probs, keys), Head::of(&dprobs, keys)); // P, dS [rows, keys]
                // SAFETY: as above; this task alone writes this head of dQ, dK and dV
                unsafe {
                    product([rows, keys, h], (dp, false), (k, false), Accum::Replace, dq);
                    product([keys, rows, h], (dp, true), (q, false), accum, dk);
                    product([keys, rows, h], (p, true), (do_, false), accum, dv);
                }
                accum = Accum::Add;
            }
        }
    });
    [dq, dk, dv]
}
