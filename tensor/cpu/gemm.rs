//! Batches of matrix products, cut into one piece per thread: tiles of sgemm.rs, or, of few rows, the kernels of gemv.rs.
//!
//! Each element of C is one sum over k in a fixed order, whichever rows or columns of C a call computes; so the cut cannot
//! change a result. tests/threads.rs holds that to the bit.
//! Letters: C (m×n) = A (m×k) · B (k×n).

use super::{Accum, Buffer, Cpu, Mat, Product, Scalar, Tensor, apart, gemv, simd};
use rayon::prelude::*;
use std::borrow::Cow;

/// Below this many multiply-adds, which take one thread about 30 µs, a second one is left alone: it takes about 5 µs to wake,
/// and copies B for itself.
const WORTH_SHARING: usize = 1 << 21;

/// The same for products of few rows, in elements that are read: about 30 µs too.
const WORTH_SHARING_READ: usize = 1 << 17;

/// A matrix in memory: first element, row stride, column stride.
#[derive(Clone, Copy)]
struct Raw<P> {
    first: P,
    row: isize,
    col: isize,
}

/// One product, or the piece of one, ready to run.
struct Task<T> {
    sizes: [usize; 3],
    a: Raw<*const T>,
    b: Raw<*const T>,
    c: Raw<*mut T>,
    /// As in [`Product`].
    lower: Option<usize>,
}
// SAFETY: `tiles` makes tasks that write disjoint parts of C and only read A and B, which outlive them
unsafe impl<T: Send> Send for Task<T> {}
unsafe impl<T: Sync> Sync for Task<T> {}

impl<T: Scalar> Task<T> {
    fn run(&self, accum: Accum) {
        let Self { sizes, a, b, c, lower } = *self;
        // SAFETY: `tiles` derived pointers, sizes and strides from live tensors of matching shapes
        unsafe {
            T::gemm(Product {
                sizes,
                a: (a.first, a.row, a.col),
                b: (b.first, b.row, b.col),
                accum,
                c: (c.first, c.row),
                lower,
            });
        }
    }
}

fn raw<T: Scalar>(mat: &Mat<Cpu<T>>) -> Raw<*const T> {
    // the slice refuses a buffer shorter than its shape, which a user could hand over
    let first = mat.tensor.buffer()[..mat.tensor.len()].as_ptr().wrapping_add(mat.columns[0]);
    let stride = mat.tensor.cols() as isize;
    let (row, col) = if mat.transposed { (1, stride) } else { (stride, 1) };
    Raw { first, row, col }
}

/// m, k and n of each product of a batch.
fn sizes<T: Scalar>(a: &[Mat<Cpu<T>>], b: &[Mat<Cpu<T>>]) -> Option<[usize; 3]> {
    let ((m, k), n) = (a.first()?.sizes(), b.first()?.sizes().1);
    let alike = a.iter().zip(b).all(|(a, b)| a.sizes() == (m, k) && b.sizes() == (k, n));
    assert!(
        alike && a.len() == b.len(),
        "gemm: every product of a batch has one shape, as {} · {}",
        a[0],
        b[0]
    );
    Some([m, k, n])
}

/// `symmetric`: so are the products, and only what is on and below their diagonals will be read.
pub(super) fn gemm<T: Scalar>(
    a: &[Mat<Cpu<T>>],
    b: &[Mat<Cpu<T>>],
    c: &mut [&mut Tensor<Cpu<T>>],
    accum: Accum,
    symmetric: bool,
) {
    assert!(a.len() == c.len(), "gemm: batch sizes differ");
    let Some(shape @ [m, k, n]) = sizes(a, b) else { return };
    for c in c.iter() {
        assert!((c.rows(), c.cols()) == (m, n), "gemm: {} · {} → {}", a[0], b[0], c.shape());
    }
    if m * n == 0 {
        return;
    }
    if !symmetric && few_rows(&a[0], &b[0]).is_some() {
        let threads = rayon::current_num_threads();
        let shared = threads > 1 && c.len() * k * m.max(n) >= WORTH_SHARING_READ;
        let pieces = if shared { threads.div_ceil(c.len()) } else { 1 };
        if shared && c.len() > 1 {
            let all = a.par_iter().zip(b).zip(c);
            all.for_each(|((a, b), c)| few_rows_product(a, b, c, accum, pieces));
        } else {
            let all = a.iter().zip(b).zip(c);
            all.for_each(|((a, b), c)| few_rows_product(a, b, c, accum, pieces));
        }
        return;
    }
    let c =
        c.iter_mut().map(|c| Raw { first: c.buffer_mut()[..m * n].as_mut_ptr(), row: n as isize, col: 1 });
    // SAFETY: each C has the size just checked, and a buffer of its own
    unsafe { tiles(shape, a, b, c.collect(), accum, symmetric) };
}

/// `C[:, first[i]..] ← A·B`, in columns of each product's own.
pub(super) fn gemm_beside<T: Scalar>(
    a: &[Mat<Cpu<T>>],
    b: &[Mat<Cpu<T>>],
    c: &mut Tensor<Cpu<T>>,
    first: &[usize],
) {
    assert!(a.len() == first.len(), "gemm: batch sizes differ");
    let Some(shape @ [m, _, n]) = sizes(a, b) else { return };
    apart(first, n, c);
    assert!(c.rows() == m, "gemm: {} · {} → columns of {}", a[0], b[0], c.shape());
    if m * n == 0 {
        return;
    }
    let (row, len) = (c.cols() as isize, c.len());
    let start = c.buffer_mut()[..len].as_mut_ptr();
    let c = first.iter().map(|&first| Raw { first: start.wrapping_add(first), row, col: 1 }).collect();
    // SAFETY: C has the rows, and the columns of each product end before those of the next
    unsafe { tiles(shape, a, b, c, Accum::Replace, false) };
}

/// The batch as tiles of sgemm.rs, shared among the threads.
///
/// # Safety
/// The operands have the `sizes` [m, k, n], none of them 0 but k, and each C m rows and n columns, which are no other's.
unsafe fn tiles<T: Scalar>(
    [m, k, n]: [usize; 3],
    a: &[Mat<Cpu<T>>],
    b: &[Mat<Cpu<T>>],
    c: Vec<Raw<*mut T>>,
    accum: Accum,
    symmetric: bool,
) {
    let threads = rayon::current_num_threads();
    let shared = threads > 1 && c.len() * m * k * n >= WORTH_SHARING;
    let pieces = if shared { threads.div_ceil(c.len()) } else { 1 };

    let mut tasks = Vec::with_capacity(c.len() * pieces);
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        let (a, b) = (raw(a), raw(b));
        // the longer side of C is cut, in multiples of the microkernel's 16
        let by_rows = m >= n;
        let long = if by_rows { m } else { n };
        let step = long.div_ceil(pieces).next_multiple_of(16);
        for start in (0..long).step_by(step) {
            let size = step.min(long - start);
            let at = start as isize;
            // SAFETY: start < m (or n), so the moved pointers stay inside their matrices
            tasks.push(unsafe {
                if by_rows {
                    let a = Raw { first: a.first.offset(at * a.row), ..a };
                    let c = Raw { first: c.first.offset(at * c.row), ..c };
                    Task { sizes: [size, k, n], a, b, c, lower: symmetric.then_some(start) }
                } else {
                    let b = Raw { first: b.first.offset(at * b.col), ..b };
                    let c = Raw { first: c.first.offset(at * c.col), ..c };
                    Task { sizes: [m, k, size], a, b, c, lower: None }
                }
            });
        }
    }
    if shared {
        tasks.par_iter().for_each(|task| task.run(accum));
    } else {
        tasks.iter().for_each(|task| task.run(accum));
    }
}

/// A product as Y = X·M with few rows of X, Y (m×n) and X (m×k): C = A·B itself, or Cᵀ = Bᵀ·Aᵀ, where C is one column.
struct FewRows<'a, T: Scalar> {
    sizes: [usize; 3],
    x: Cow<'a, [T]>,
    matrix: gemv::Matrix<'a, T>,
}

/// This product as one of few rows, if it is worth it (gemv.rs). A kind that adds up whole rows of M wants them longer than a few.
fn few_rows<'a, T: Scalar>(a: &Mat<'a, Cpu<T>>, b: &Mat<'a, Cpu<T>>) -> Option<FewRows<'a, T>> {
    const SHORT: usize = 8;
    let ((m, k), n) = (a.sizes(), b.sizes().1);
    let values =
        |mat: &Mat<'a, Cpu<T>>| &mat.tensor.buffer()[mat.columns[0].min(mat.tensor.len())..mat.tensor.len()];
    let matrix = |mat: &Mat<'a, Cpu<T>>, transposed: bool| gemv::Matrix {
        values: values(mat),
        stride: mat.tensor.cols(),
        transposed,
    };
    let narrow = |mat: &Mat<Cpu<T>>| mat.columns[1] != mat.tensor.cols() && mat.tensor.rows() > 1;
    if n == 1 && !b.transposed && narrow(b) {
        return None; // its elements are apart
    }
    if n == 1 && m > 1 {
        let matrix = matrix(a, !a.transposed);
        let worth = matrix.transposed || m >= SHORT;
        return worth.then(|| FewRows { sizes: [1, k, m], x: Cow::Borrowed(values(b)), matrix });
    }
    // a single column is contiguous, whichever way it is looked at
    let matrix = if n == 1 { gemv::Matrix { stride: k, ..matrix(b, true) } } else { matrix(b, b.transposed) };
    if m > gemv::ROWS || !(matrix.transposed || n >= SHORT) {
        return None;
    }
    let mut x = Cow::Borrowed(values(a)); // [m, k]
    if (a.transposed && m > 1) || narrow(a) {
        let Raw { row, col, .. } = raw(a);
        x = (0..m * k).map(|i| x[i / k * row as usize + i % k * col as usize]).collect();
    }
    Some(FewRows { sizes: [m, k, n], x, matrix })
}

/// C ← or += A·B with few rows of A, or one column of B, shared among threads if `pieces` is more than 1.
fn few_rows_product<T: Scalar>(
    a: &Mat<Cpu<T>>,
    b: &Mat<Cpu<T>>,
    c: &mut Tensor<Cpu<T>>,
    accum: Accum,
    pieces: usize,
) {
    let FewRows { sizes: [m, k, n], x, matrix } =
        few_rows(a, b).expect("one shape, and so one kind, in a batch");
    let c = &mut c.buffer_mut()[..m * n];
    let (columns, parts) = match matrix.transposed {
        true => (n.div_ceil(pieces).next_multiple_of(16), 1),
        false => (n, k.div_ceil(gemv::PART).max(1)),
    };
    // Y [m, n]: column piece by column piece, each [m, columns], or as many parts of the sum
    let run = |(i, y): (usize, &mut [T])| {
        simd(
            #[inline(always)]
            || match matrix.transposed {
                true => gemv::dots([m, k], &x, matrix, i * columns, y),
                false => {
                    let start = i * gemv::PART;
                    gemv::weighted_rows([m, k], &x, matrix, start..k.min(start + gemv::PART), y);
                }
            },
        );
    };
    let multiply = |y: &mut [T]| {
        if pieces > 1 {
            y.par_chunks_mut(columns * m).enumerate().for_each(run);
        } else {
            y.chunks_mut(columns * m).enumerate().for_each(run);
        }
    };
    if accum == Accum::Replace && parts == 1 && (m == 1 || columns >= n) {
        return multiply(c);
    }
    let mut y = Buffer::scratch(m * n * parts);
    multiply(&mut y);
    for (i, y) in y.chunks(columns * m).enumerate() {
        let (width, start) = (y.len() / m, if matrix.transposed { i * columns } else { 0 });
        let first = matrix.transposed || i == 0; // the other parts of a sum are added to it
        for (row, y) in y.chunks_exact(width).enumerate() {
            let c = &mut c[row * n + start..][..width];
            match accum {
                Accum::Replace if first => c.copy_from_slice(y),
                _ => c.iter_mut().zip(y).for_each(|(c, &y)| *c += y),
            }
        }
    }
}

pub(super) fn gemm_symmetric<T: Scalar>(a: &[Mat<Cpu<T>>], b: &[Mat<Cpu<T>>], c: &mut [&mut Tensor<Cpu<T>>]) {
    gemm(a, b, c, Accum::Replace, true);
    for c in c {
        mirror(c.cols(), c.buffer_mut());
    }
}

/// Copies what is below the diagonal of a matrix of `n` columns over what is above it, in blocks whose rows and columns both
/// stay in the first-level cache.
fn mirror<T: Scalar>(n: usize, c: &mut [T]) {
    const BLOCK: usize = 16;
    for i0 in (0..n).step_by(BLOCK) {
        for j0 in (0..=i0).step_by(BLOCK) {
            for i in i0..n.min(i0 + BLOCK) {
                for j in j0..i.min(j0 + BLOCK) {
                    c[j * n + i] = c[i * n + j];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Backend;

    /// Few rows or one column, all transpositions, both ways to accumulate, shared out and not: against the sum in f64; and a
    /// row by itself has the bits that it has among others.
    #[test]
    fn few_rows_agree_with_the_sum_in_f64_and_with_each_other() {
        agree::<f32>();
        agree::<f64>();
    }

    /// x between three columns and two that are NaN.
    fn among_others<T: Scalar>(x: &Tensor<Cpu<T>>) -> Tensor<Cpu<T>> {
        let mut wide = Tensor::full(x.device(), [x.rows(), x.cols() + 5], f64::NAN); // [rows, cols + 5]
        wide.copy_cols(3, x, 0..x.cols());
        wide
    }

    fn agree<T: Scalar>() {
        let cpu = Cpu::<T>::default();
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 2048) as f64 / 1024.0 - 1.0;
        let sizes = [1, 2, 3, 4].into_iter().flat_map(|m| {
            [0, 1, 3, 17, 130].into_iter().flat_map(move |k| [1, 7, 8, 37, 2100].map(|n| [m, k, n]))
        });
        let columns = [5, 9, 33, 2100].into_iter().flat_map(|m| [0, 1, 18, 131].map(|k| [m, k, 1]));
        for (case, [m, k, n]) in sizes.chain(columns).enumerate() {
            for variant in 0..8 {
                let (ta, tb, add) = (variant & 1 == 1, variant & 2 == 2, variant & 4 == 4);
                let draw = |shape: [usize; 2], t: bool, seed: usize| {
                    let shape = if t { [shape[1], shape[0]] } else { shape };
                    Tensor::from_fn(&cpu, shape, |i| T::of(value(i + seed + case))) // shape
                };
                let (a, b) = (draw([m, k], ta, 0), draw([k, n], tb, 12_345)); // [m, k], [k, n] or transposed
                let start = draw([m, n], false, 54_321); // [m, n]
                let (am, bm) = (Mat::from(&a).t_if(ta), Mat::from(&b).t_if(tb));
                let accum = if add { Accum::Add } else { Accum::Replace };
                let mut c = start.clone(); // [m, n]
                Cpu::gemm(&[am], &[bm], &mut [&mut c], accum);
                let (wide_a, wide_b) = (among_others(&a), among_others(&b)); // 5 columns more each
                let part = |x, wide, t| Mat::columns(wide, 3..3 + Tensor::cols(x)).t_if(t);
                let (am, bm) = (part(&a, &wide_a, ta), part(&b, &wide_b, tb));
                let mut parts = start.clone(); // [m, n]
                Cpu::gemm(&[am], &[bm], &mut [&mut parts], accum);
                let (a, b, start) = (a.to_f64(), b.to_f64(), start.to_f64());
                let (c, parts) = (c.to_f64(), parts.to_f64());
                let at = |t: bool, [rows, cols]: [usize; 2], i: usize, j: usize| {
                    if t { j * rows + i } else { i * cols + j }
                };
                for i in 0..m {
                    for j in 0..n {
                        let term = |p: usize| a[at(ta, [m, k], i, p)] * b[at(tb, [k, n], p, j)];
                        let before = if add { start[i * n + j] } else { 0.0 };
                        let want = before + (0..k).map(term).sum::<f64>();
                        let size = 1.0 + (0..k).map(|p| term(p).abs()).sum::<f64>();
                        // two roundings a term, each at most half an ulp of the sum of magnitudes
                        let tolerance = (2 * k + 2) as f64 * T::epsilon().f64() * size;
                        for got in [c[i * n + j], parts[i * n + j]] {
                            assert!(
                                (got - want).abs() <= tolerance,
                                "{m}×{k}×{n} {ta} {tb} {accum:?}: [{i}, {j}] is {got}, not {want}"
                            );
                        }
                    }
                }
                if !ta && m > 1 && m <= gemv::ROWS && n >= 8 {
                    let last = Tensor::from_fn(&cpu, [1, k], |p| T::of(a[(m - 1) * k + p])); // [1, k]
                    let mut alone = Tensor::from_fn(&cpu, [1, n], |j| T::of(start[(m - 1) * n + j])); // [1, n]
                    Cpu::gemm(&[(&last).into()], &[bm], &mut [&mut alone], accum);
                    assert!(alone.to_f64() == c[(m - 1) * n..], "{m}×{k}×{n} {tb}: the last row alone");
                }
            }
        }
    }
}
