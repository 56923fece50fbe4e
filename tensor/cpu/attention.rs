//! Softmax attention, forward and backward, over blocks of queries and chunks of keys: scores exist for one of each at a time, and none are
//! computed above the diagonal's block. Only the log-sum-exp of each query is kept; the backward recomputes probabilities
//! from it (Dao et al. 2022, arXiv 2205.14135, section 3).
//!
//! A block's scores stand transposed, a row for each key: so K and V are read where they are instead of being copied for each block, and
//! maxima and sums over keys are taken for 32 queries at a time, element by element.
//!
//! Letters: tq, tk query and key lengths; h head size; S scores, P probabilities, O output, each for one block of one head.
//! Parallel over (sequence, key/value head): the query heads that share it run in turn, so dK and dV are summed in a fixed order.

use super::{Accum, Attention, Buffer, Cpu, Product, Scalar, Tensor, gemv, rows, simd};
use rayon::prelude::*;

type Cpus<T> = Tensor<Cpu<T>>;

/// Queries whose scores of a key are handled at once.
const GROUP: usize = 32;

/// A number for each query of a group.
type Group<T> = [T; GROUP];

/// Groups per block, among few keys and among many: a larger block reads K and V less often, and wastes more above the diagonal.
const GROUPS: [usize; 2] = [1, 2];

/// Keys per chunk, and how many are many: the scores of a block and their gradient stay in the second-level cache.
const CHUNK: usize = 512;

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
    /// Query heads that share a key/value head.
    sharing: usize,
    /// Groups of queries per block.
    groups: usize,
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
            sharing: how.heads / how.kv_heads,
            groups: GROUPS[usize::from(k.rows() / how.batch >= CHUNK)],
            scale: 1.0 / (h as f64).sqrt(),
            how,
        }
    }

    /// Queries per block.
    fn block(&self) -> usize {
        self.groups * GROUP
    }

    /// (first query, queries, keys that the last of them sees) of each block.
    fn blocks(&self) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> + '_ {
        (0..self.tq.div_ceil(self.block())).map(|i| {
            let start = i * self.block();
            let rows = self.block().min(self.tq - start);
            (start, rows, self.keys_of(start + rows - 1))
        })
    }

    /// A block's scores of one chunk: finite, also in the columns that a block of fewer queries leaves alone.
    fn scores<T: Scalar>(&self) -> Buffer<T> {
        let mut scores = Buffer::scratch(CHUNK.min(self.tk) * self.block()); // [chunk, block]
        scores.fill(T::zero());
        scores
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

/// (first key, keys) of each chunk.
fn chunks(keys: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..keys).step_by(CHUNK).map(move |first| (first, CHUNK.min(keys - first)))
}

/// Which scores of a block: of a group's queries, from `start` on, and `keys` keys from key `first` on.
struct Part {
    group: usize,
    start: usize,
    first: usize,
    keys: usize,
}

impl Part {
    /// Their rows, one for each key.
    #[inline(always)]
    fn rows<'a, T>(
        &self,
        scores: &'a mut [T],
        z: &Sizes,
    ) -> impl Iterator<Item = &'a mut Group<T>> + use<'a, T> {
        scores.as_chunks_mut().0.iter_mut().skip(self.group).step_by(z.groups).take(self.keys)
    }

    /// How many of the queries, the first ones, do not see key `t` of these.
    #[inline(always)]
    fn hidden(&self, z: &Sizes, t: usize) -> usize {
        if !z.how.causal {
            return 0;
        }
        (self.first + t + z.tq).saturating_sub(z.tk + self.start).min(GROUP)
    }

    /// How many of the keys all queries see.
    #[inline(always)]
    fn seen_by_all(&self, z: &Sizes) -> usize {
        z.keys_of(self.start).saturating_sub(self.first).min(self.keys)
    }
}

/// The largest score of each query of a group so far, and Σ e^(scale·(score − it)).
#[derive(Clone, Copy)]
struct Running<T> {
    top: Group<T>,
    total: Group<T>,
}

impl<T: Scalar> Running<T> {
    fn new() -> Self {
        Self { top: [T::neg_infinity(); GROUP], total: [T::zero(); GROUP] }
    }

    /// S → P, not yet divided by its sum. Returns what P of the keys before has to be multiplied with.
    #[inline(always)]
    fn softmax(&mut self, s: &mut [T], z: &Sizes, part: &Part) -> Group<T> {
        let (before, scale, seen_by_all) = (self.top, T::of(z.scale), part.seen_by_all(z));
        // what is hidden becomes a score that is finite and there anyway, so that it changes no maximum: e^−∞ would take its time
        let first = part.rows(s, z).next().map_or(before, |row| *row);
        let stand_in = if part.first == 0 { first } else { before };
        for (t, row) in part.rows(s, z).enumerate().skip(seen_by_all) {
            let hidden = part.hidden(z, t);
            row[..hidden].copy_from_slice(&stand_in[..hidden]);
        }
        let mut top = before;
        for row in part.rows(s, z) {
            for (top, &s) in top.iter_mut().zip(row.iter()) {
                *top = if s > *top { s } else { *top };
            }
        }
        let (mut shrink, mut total) = (before, self.total);
        for ((shrink, total), &top) in shrink.iter_mut().zip(&mut total).zip(&top) {
            *shrink = ((*shrink - top) * scale).fast_exp();
            *total *= *shrink;
        }
        for (t, row) in part.rows(s, z).enumerate() {
            for (s, &top) in row.iter_mut().zip(&top) {
                *s = ((*s - top) * scale).fast_exp();
            }
            if t >= seen_by_all {
                row[..part.hidden(z, t)].fill(T::zero());
            }
            for (total, &p) in total.iter_mut().zip(row.iter()) {
                *total += p;
            }
        }
        *self = Self { top, total };
        shrink
    }
}

/// x ← softmax(scale·x); returns the log-sum-exp.
#[inline(always)]
fn softmax<T: Scalar>(x: &mut [T], scale: T) -> T {
    let top = rows::max(x);
    for s in x.iter_mut() {
        *s = ((*s - top) * scale).fast_exp();
    }
    let total = rows::sum(x, |p| p);
    x.iter_mut().for_each(|p| *p /= total);
    top * scale + total.ln()
}

/// [`attention`] of one query per sequence, which sees every key: K and V are read where they stand.
fn one_query<T: Scalar>(q: &Cpus<T>, k: &Cpus<T>, v: &Cpus<T>, z: &Sizes) -> (Cpus<T>, Cpus<T>) {
    let Attention { batch, heads, kv_heads, .. } = z.how;
    let (h, stride) = (z.h, k.cols());
    let mut o = Tensor::scratch(q.device(), q.shape()); // [batch, heads·h]
    let mut lse = Tensor::scratch(q.device(), [batch, heads, 1]); // [batch, heads, 1]
    let (qs, ks, vs) = (whole(q, q), whole(k, k), whole(v, k));
    let tasks = rayon::current_num_threads().div_ceil(batch).min(kv_heads); // of a sequence
    let kv_each = kv_heads.div_ceil(tasks);
    let each = kv_each * z.sharing;
    let outputs = o.buffer_mut().par_chunks_mut(heads * h).zip(lse.buffer_mut().par_chunks_mut(heads));
    outputs.zip(qs.par_chunks(heads * h)).enumerate().for_each(|(sequence, ((o, lse), q))| {
        let parts = o.par_chunks_mut(each * h).zip(lse.par_chunks_mut(each)).zip(q.par_chunks(each * h));
        parts.enumerate().for_each(|(task, ((o, lse), q))| {
            let first = sequence * z.tk * stride + task * kv_each * h;
            simd(
                #[inline(always)]
                || one_query_of(z, stride, [q, &ks[first..], &vs[first..]], o, lse),
            );
        });
    });
    (o, lse)
}

/// The query heads of one task, q and o [heads·h], whose keys and values begin with k and v. Rows of K and V are read as gemv.rs does,
/// for all heads together: they come from memory, where a head by itself is a few lines here and there.
#[inline(always)]
fn one_query_of<T: Scalar>(z: &Sizes, stride: usize, [q, k, v]: [&[T]; 3], o: &mut [T], lse: &mut [T]) {
    let Sizes { h, sharing, tk, scale, .. } = *z;
    let head = |t: usize, j: usize| t * stride + j / sharing * h..t * stride + (j / sharing + 1) * h;
    let mut p = Buffer::scratch(lse.len() * tk); // S, then P [heads, tk]
    for t in 0..tk / 4 {
        let at = gemv::quarters(t, tk);
        for (j, (q, p)) in q.chunks_exact(h).zip(p.chunks_exact_mut(tk)).enumerate() {
            let scores = gemv::four_dots(q, at.map(|t| &k[head(t, j)])); // S = Q·Kᵀ
            at.into_iter().zip(scores).for_each(|(t, s)| p[t] = s);
        }
    }
    for t in tk - tk % 4..tk {
        for (j, (q, p)) in q.chunks_exact(h).zip(p.chunks_exact_mut(tk)).enumerate() {
            p[t] = rows::sum2(q, &k[head(t, j)], |q, k| q * k);
        }
    }
    for (p, lse) in p.chunks_exact_mut(tk).zip(lse) {
        *lse = softmax(p, T::of(scale));
    }
    o.fill(T::zero());
    for t in 0..tk / 4 {
        let at = gemv::quarters(t, tk);
        for (j, (o, p)) in o.chunks_exact_mut(h).zip(p.chunks_exact(tk)).enumerate() {
            gemv::add_weighted(o, at.map(|t| p[t]), at.map(|t| &v[head(t, j)])); // O = P·V
        }
    }
    for t in tk - tk % 4..tk {
        for (j, (o, p)) in o.chunks_exact_mut(h).zip(p.chunks_exact(tk)).enumerate() {
            o.iter_mut().zip(&v[head(t, j)]).for_each(|(o, &v)| *o += p[t] * v);
        }
    }
}

pub(super) fn attention<T: Scalar>(
    q: &Cpus<T>,
    k: &Cpus<T>,
    v: &Cpus<T>,
    how: Attention,
) -> (Cpus<T>, Cpus<T>) {
    let z = Sizes::new(q, k, how);
    if z.tq == 1 {
        return one_query(q, k, v, &z);
    }
    let h = z.h;
    let mut o = Tensor::scratch(q.device(), q.shape()); // [batch·tq, heads·h]
    let mut lse = Tensor::scratch(q.device(), [how.batch, how.heads, z.tq]); // [batch, heads, tq]
    let qs = Head::of(whole(q, q), q.cols());
    let (ks, vs) = (Head::of(whole(k, k), k.cols()), Head::of(whole(v, k), v.cols()));
    let os = Head::of_mut(o.buffer_mut(), q.cols());
    let lses = Head::of_mut(lse.buffer_mut(), z.tq);
    z.for_each(|b, kv| {
        let (k, v) = (ks.at(b * z.tk, kv * h), vs.at(b * z.tk, kv * h));
        let mut scores = z.scores(); // [chunk, block]
        for j in kv * z.sharing..(kv + 1) * z.sharing {
            for (start, rows, keys) in z.blocks() {
                let (q, o) = (qs.at(b * z.tq + start, j * h), os.at(b * z.tq + start, j * h));
                // SAFETY: this task alone writes this head's log-sum-exps
                let lse =
                    unsafe { std::slice::from_raw_parts_mut(lses.at(b * how.heads + j, start).first, rows) };
                let mut running = [Running::new(); GROUPS[1]];
                // SAFETY: this task alone writes this head of O, and not while a row of it is borrowed
                let o_row = |i: usize| unsafe { std::slice::from_raw_parts_mut(o.at(i, 0).first, h) };
                for (first, keys) in chunks(keys) {
                    let (k, v) = (k.at(first, 0), v.at(first, 0));
                    let s = Head::of_mut(&mut scores, z.block());
                    // Sᵀ = K·Qᵀ
                    // SAFETY: the block's queries, the chunk of visible keys and the scratch all hold these sizes
                    unsafe { product([keys, h, rows], (k, false), (q, true), Accum::Replace, s) };
                    simd(
                        #[inline(always)]
                        || {
                            for (group, running) in running[..rows.div_ceil(GROUP)].iter_mut().enumerate() {
                                let part = Part { group, start: start + group * GROUP, first, keys };
                                let shrink = running.softmax(&mut scores, &z, &part);
                                if first > 0 {
                                    let queries = group * GROUP..rows.min((group + 1) * GROUP);
                                    for (i, shrink) in queries.zip(shrink) {
                                        o_row(i).iter_mut().for_each(|o| *o *= shrink);
                                    }
                                }
                            }
                        },
                    );
                    let p = Head::of(&scores, z.block()); // Pᵀ [keys, block]
                    let accum = if first == 0 { Accum::Replace } else { Accum::Add };
                    // O = Σ P·V over the chunks
                    // SAFETY: as above; this task alone writes this head of O
                    unsafe { product([rows, keys, h], (p, true), (v, false), accum, o) };
                }
                simd(
                    #[inline(always)]
                    || {
                        for (i, lse) in lse.iter_mut().enumerate() {
                            let Running { top, total } = &running[i / GROUP];
                            let (top, total) = (top[i % GROUP], total[i % GROUP]);
                            let share = T::one() / total;
                            o_row(i).iter_mut().for_each(|o| *o *= share);
                            *lse = top * T::of(z.scale) + total.ln();
                        }
                    },
                );
            }
        }
    });
    (o, lse)
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
        let (mut probs, mut dprobs) = (z.scores(), z.scores()); // [chunk, block] each
        // the last block sees every key, so it comes first and replaces what dK and dV held; the others add
        let mut accum = Accum::Replace;
        for j in kv * z.sharing..(kv + 1) * z.sharing {
            for (start, rows, keys) in z.blocks().rev() {
                let row0 = b * z.tq + start;
                let (q, do_) = (qs.at(row0, j * h), dos.at(row0, j * h));
                let dq = dqs.at(row0, j * h);
                let [mut lses, mut pulls] = [[[T::zero(); GROUP]; GROUPS[1]]; 2]; // of each query, group by group
                simd(
                    #[inline(always)]
                    || {
                        let lse = &lse[(b * how.heads + j) * z.tq + start..][..rows];
                        lses.as_flattened_mut()[..rows].copy_from_slice(lse);
                        for (i, pull) in pulls.as_flattened_mut()[..rows].iter_mut().enumerate() {
                            let at = (row0 + i) * how.heads * h + j * h;
                            *pull = rows::sum2(&o[at..][..h], &dout[at..][..h], |o, d| o * d);
                        }
                    },
                );
                for (first, keys) in chunks(keys) {
                    let (k, v, dk, dv) = (k.at(first, 0), v.at(first, 0), dk.at(first, 0), dv.at(first, 0));
                    let (p, dp) = (Head::of_mut(&mut probs, z.block()), Head::of_mut(&mut dprobs, z.block()));
                    // SAFETY: the block's queries, the chunk of visible keys and the scratch all hold these sizes
                    unsafe {
                        product([keys, h, rows], (k, false), (q, true), Accum::Replace, p); // Sᵀ [keys, rows]
                        product([keys, h, rows], (v, false), (do_, true), Accum::Replace, dp); // dPᵀ [keys, rows]
                    }
                    simd(
                        #[inline(always)]
                        || {
                            for group in 0..rows.div_ceil(GROUP) {
                                let part = Part { group, start: start + group * GROUP, first, keys };
                                let (lse, pull, seen) = (lses[group], pulls[group], part.seen_by_all(&z));
                                let dp = part.rows(&mut dprobs, &z);
                                for (t, (p, dp)) in part.rows(&mut probs, &z).zip(dp).enumerate() {
                                    for i in 0..GROUP {
                                        p[i] = (p[i] * scale - lse[i]).fast_exp();
                                        dp[i] = p[i] * (dp[i] - pull[i]) * scale;
                                    }
                                    if t >= seen {
                                        let hidden = part.hidden(&z, t);
                                        p[..hidden].fill(T::zero());
                                        dp[..hidden].fill(T::zero());
                                    }
                                }
                            }
                        },
                    );
                    let (p, dp) = (Head::of(&probs, z.block()), Head::of(&dprobs, z.block())); // Pᵀ, dSᵀ [keys, rows]
                    let dq_accum = if first == 0 { Accum::Replace } else { Accum::Add };
                    // SAFETY: as above; this task alone writes this head of dQ, dK and dV
                    unsafe {
                        product([rows, keys, h], (dp, true), (k, false), dq_accum, dq);
                        product([keys, rows, h], (dp, false), (q, false), accum, dk);
                        product([keys, rows, h], (p, false), (do_, false), accum, dv);
                    }
                }
                accum = Accum::Add;
            }
        }
    });
    [dq, dk, dv]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel for one query finds what the blocks find for the last of several.
    #[test]
    fn one_query_is_the_last_of_several() {
        let cpu = Cpu::<f64>::default();
        for (batch, heads, kv_heads, h, keys) in [(1, 4, 2, 16, 77), (3, 2, 2, 6, 1), (2, 6, 1, 33, 130)] {
            let how = Attention { batch, heads, kv_heads, causal: true };
            let draw = |rows: usize, cols: usize, seed: usize| {
                Tensor::from_fn(&cpu, [rows, cols], |i| {
                    (((i + seed) * 7919 % 1013) as f64 / 506.0 - 1.0) * 2.0
                }) // [rows, cols]
            };
            let k = draw(batch * keys, kv_heads * h, 1); // [batch·keys, kv_heads·h]
            let v = draw(batch * keys, kv_heads * h, 2); // [batch·keys, kv_heads·h]
            let q = draw(batch, heads * h, 3); // [batch, heads·h]
            let (o, lse) = attention(&q, &k, &v, how);
            for b in 0..batch {
                // the same query twice, as one alone would not go through the blocks
                let row = &q.buffer()[b * heads * h..][..heads * h];
                let twice = Tensor::from_vec(&cpu, [2, heads * h], [row, row].concat()); // [2, heads·h]
                let of = |x: &Cpus<f64>| {
                    let run = keys * kv_heads * h;
                    Tensor::from_vec(&cpu, [keys, kv_heads * h], x.buffer()[b * run..][..run].to_vec()) // [keys, kv_heads·h]
                };
                let one = Attention { batch: 1, causal: false, ..how };
                let (want, want_lse) = attention(&twice, &of(&k), &of(&v), one);
                for j in 0..heads * h {
                    assert!((o.buffer()[b * heads * h + j] - want.buffer()[heads * h + j]).abs() < 1e-13);
                }
                for j in 0..heads {
                    assert!((lse.buffer()[b * heads + j] - want_lse.buffer()[2 * j + 1]).abs() < 1e-13);
                }
            }
        }
    }

    /// More keys than a chunk has, so that softmax goes on from one chunk to the next: value and gradients by the formulas over whole rows.
    #[test]
    fn chunks_add_up() {
        let cpu = Cpu::<f64>::default();
        for (tq, tk, heads, kv_heads, causal) in [
            (CHUNK + 70, CHUNK + 70, 2, 1, true),
            (90, 2 * CHUNK + 1, 2, 2, true),
            (3, 2 * CHUNK + 50, 1, 1, false),
        ] {
            let (h, how) = (3, Attention { batch: 1, heads, kv_heads, causal });
            let draw = |rows: usize, cols: usize, seed: usize, size: f64| {
                let value = |i| (((i + seed) * 7919 % 1013) as f64 / 506.0 - 1.0) * size;
                Tensor::from_fn(&cpu, [rows, cols], value) // [rows, cols]
            };
            // scores of some ±10 that grow with the keys, so that later chunks change the maximum
            let q = draw(tq, heads * h, 3, 2.0); // [tq, heads·h]
            let k = Tensor::from_fn(&cpu, [tk, kv_heads * h], |i| {
                (((i + 1) * 7919 % 1013) as f64 / 506.0 - 1.0)
                    * (1.0 + 2.0 * i as f64 / (tk * kv_heads * h) as f64)
            }); // [tk, kv_heads·h]
            let (v, dout) = (draw(tk, kv_heads * h, 2, 1.0), draw(tq, heads * h, 5, 1.0)); // [tk, kv_heads·h], [tq, heads·h]
            let (o, lse) = attention(&q, &k, &v, how);
            let [dq, dk, dv] = attention_grad([&q, &k, &v], &o, &lse, &dout, how);
            let [mut want_dk, mut want_dv] = [(); 2].map(|()| vec![0.0; tk * kv_heads * h]);
            let row = |x: &Cpus<f64>, i: usize, j: usize| x.buffer()[i * x.cols() + j * h..][..h].to_vec();
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
            let close = |what: &str, got: &[f64], want: &[f64]| {
                // sums of some 1,100 terms of size 1, in another order: 1,100·2⁻⁵³ = 1.2e-13, and the softmax of scores up to 10 times that
                let off = got.iter().zip(want).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                assert!(off < 2e-12, "{what} for {how:?}, {tq} queries, {tk} keys: off by {off:e}");
            };
            let scale = 1.0 / (h as f64).sqrt();
            for j in 0..heads {
                let kv = j / (heads / kv_heads);
                for i in 0..tq {
                    let keys = if causal { i + 1 + tk - tq } else { tk };
                    let (q, d) = (row(&q, i, j), row(&dout, i, j));
                    let scores: Vec<f64> = (0..keys).map(|t| scale * dot(&q, &row(&k, t, kv))).collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                    let p: Vec<f64> = scores.iter().map(|s| (s - top).exp() / total).collect();
                    let (mut want_o, mut want_dq) = (vec![0.0; h], vec![0.0; h]);
                    for (t, p) in p.iter().enumerate() {
                        let v = row(&v, t, kv);
                        (0..h).for_each(|c| want_o[c] += p * v[c]);
                    }
                    for (t, p) in p.iter().enumerate() {
                        let ds = scale * p * (dot(&d, &row(&v, t, kv)) - dot(&d, &want_o));
                        let k = row(&k, t, kv);
                        for c in 0..h {
                            want_dq[c] += ds * k[c];
                            want_dk[(t * kv_heads + kv) * h + c] += ds * q[c];
                            want_dv[(t * kv_heads + kv) * h + c] += p * d[c];
                        }
                    }
                    close("o", &row(&o, i, j), &want_o);
                    close("lse", &[lse.buffer()[j * tq + i]], &[top + total.ln()]);
                    close("dq", &row(&dq, i, j), &want_dq);
                }
            }
            close("dk", dk.buffer(), &want_dk);
            close("dv", dv.buffer(), &want_dv);
        }
    }
}
