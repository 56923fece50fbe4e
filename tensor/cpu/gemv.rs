//! Products of few rows with a matrix. Each takes as long as reading the matrix, so it is read once and never
//! copied, as the tiles of sgemm.rs would do.
//!
//! Four rows of the matrix are read at a time, each the next one of a quarter of its rows: four long stretches of memory that the
//! processor fetches ahead by itself. (Four rows that follow each other are read at half that rate where they are shorter than a page.)
//!
//! Each element of Y is one sum over k in an order that depends on k alone: not on the other rows or columns that a call
//! computes, so neither the cut among threads nor the company of other rows changes a bit. Where rows of M are added up, the
//! rows are divided, in parts of [`PART`] whoever computes them, so that each thread reads one stretch of memory.
//! Letters: Y (m×n) = X (m×k) · M (k×n); i, p, j run over m, k, n.

use std::ops::Range;

use super::{Scalar, rows};
use rows::LANES;

/// Rows of X up to which this beats the tiles: each costs a pass over what was read.
pub(super) const ROWS: usize = 4;

/// Rows of M that are added up together.
pub(super) const PART: usize = 128;

/// Columns of Y that stay in the first-level cache while the rows of M pass by.
const BLOCK: usize = 2048;

/// M in memory, its rows `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    pub values: &'a [T],
    pub stride: usize,
    /// n rows of k elements instead of k rows of n.
    pub transposed: bool,
}

/// i, and i in each of the other three quarters of `n` numbers.
#[inline(always)]
pub(super) fn quarters(i: usize, n: usize) -> [usize; 4] {
    [0, 1, 2, 3].map(|quarter| i + quarter * (n / 4))
}

/// Of a transposed M: Y [m, w] ← columns `start..start + w` of X [m, k] · M, with m·w elements in `y`; y[i, j] = Σ x[i, p]·b[j, p].
/// To be called in `simd`.
#[inline(always)]
pub(super) fn dots<T: Scalar>([m, k]: [usize; 2], x: &[T], matrix: Matrix<T>, start: usize, y: &mut [T]) {
    if k == 0 {
        return y.fill(T::zero());
    }
    let Matrix { values, stride, .. } = matrix;
    let b = &values[start * stride..];
    let w = y.len() / m;
    let row = |j: usize| &b[j * stride..][..k];
    for j in 0..w / 4 {
        let at = quarters(j, w);
        for (i, x) in x.chunks_exact(k).take(m).enumerate() {
            for (j, sum) in at.into_iter().zip(four_dots(x, at.map(row))) {
                y[i * w + j] = sum;
            }
        }
    }
    for j in w - w % 4..w {
        for (i, x) in x.chunks_exact(k).take(m).enumerate() {
            y[i * w + j] = rows::sum2(x, row(j), |x, b| x * b);
        }
    }
}

/// The products of x with each of four rows as long, each by the same additions as `rows::sum2`.
#[inline(always)]
pub(super) fn four_dots<T: Scalar>(x: &[T], [b0, b1, b2, b3]: [&[T]; 4]) -> [T; 4] {
    // A name for each row: sums that a loop over rows indexed were kept in memory, and added one at a time.
    let [mut s0, mut s1, mut s2, mut s3] = [[T::zero(); LANES]; 4];
    let (x, x_rest) = x.as_chunks::<LANES>();
    let [(b0, r0), (b1, r1), (b2, r2), (b3, r3)] = [b0, b1, b2, b3].map(|b| b.as_chunks::<LANES>());
    for ((x, b0), ((b1, b2), b3)) in x.iter().zip(b0).zip(b1.iter().zip(b2).zip(b3)) {
        add_products(&mut s0, x, b0);
        add_products(&mut s1, x, b1);
        add_products(&mut s2, x, b2);
        add_products(&mut s3, x, b3);
    }
    // through a barrier: for the sake of what follows, the compiler would keep sums of the loop above in memory
    let mut sums = std::hint::black_box([s0, s1, s2, s3]);
    for (sums, rest) in sums.iter_mut().zip([r0, r1, r2, r3]) {
        add_products(sums, x_rest, rest);
    }
    sums.map(rows::fold)
}

/// Adds x ∘ b to the sums, as many as there are of either.
#[inline(always)]
fn add_products<T: Scalar>(sums: &mut [T; LANES], x: &[T], b: &[T]) {
    for ((sum, &x), &b) in sums.iter_mut().zip(x).zip(b) {
        *sum += x * b;
    }
}

/// Of an M that lies as it is: Y [m, n] ← Σ x[i, p]·b[p, j] over a part `p` of k. Four rows of b at a time also write y a quarter as
/// often. To be called in `simd`.
#[inline(always)]
pub(super) fn weighted_rows<T: Scalar>(
    [m, k]: [usize; 2],
    x: &[T],
    matrix: Matrix<T>,
    part: Range<usize>,
    y: &mut [T],
) {
    let (w, Matrix { values, stride, .. }) = (y.len() / m, matrix);
    y.fill(T::zero());
    for start in (0..w).step_by(BLOCK) {
        let width = BLOCK.min(w - start);
        let row = |p: usize| &values[p * stride + start..][..width];
        for p in 0..part.len() / 4 {
            let at = quarters(p, part.len()).map(|p| part.start + p);
            for (i, x) in x.chunks_exact(k).take(m).enumerate() {
                add_weighted(&mut y[i * w + start..][..width], at.map(|p| x[p]), at.map(row));
            }
        }
        for p in part.end - part.len() % 4..part.end {
            for (i, x) in x.chunks_exact(k).take(m).enumerate() {
                for (y, &b) in y[i * w + start..][..width].iter_mut().zip(row(p)) {
                    *y += x[p] * b;
                }
            }
        }
    }
}

/// Adds four rows, each times its weight, to y.
#[inline(always)]
pub(super) fn add_weighted<T: Scalar>(y: &mut [T], [x0, x1, x2, x3]: [T; 4], [b0, b1, b2, b3]: [&[T]; 4]) {
    for (y, ((&b0, &b1), (&b2, &b3))) in y.iter_mut().zip(b0.iter().zip(b1).zip(b2.iter().zip(b3))) {
        *y = *y + x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3;
    }
}
